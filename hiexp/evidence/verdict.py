"""What the numbers say, in sentences computed from them; nothing here knows which arm ought to win.

A difference counts where its 95% interval over seeds leaves out 0. With few seeds and many comparisons some intervals
do so by chance; the two endpoints of ``all`` and ``half`` were fixed beforehand, everything else explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hiexp.evidence.config import UNTRAINED
from hiexp.evidence.results import AS_TRAINED, BASELINE, ENDPOINTS
from hiexp.evidence.tables import Summary, with_interval
from hiexp.tasks.statistics import t_interval

_LONGER = "none-longer"
_CONTROLS = ("placebo", "shuffled", "plain")


def verdict(summary: Summary) -> list[tuple[str, list[str]]]:
    """Headings with their sentences."""
    sections = [
        ("Partial results", [f"Not finished: {one}." for one in summary["missing"]]),
        ("Does training with the HEK help?", _headlines(summary)),
        ("Why", _reasons(summary)),
        ("Is it more than having something in the prompt?", _controls(summary)),
        ("Which levels, which loss, whose experience?", _variants(summary)),
        ("New wordings and families", _generalisation(summary)),
        ("Steadier training?", _stability(summary)),
        ("Limits", _limits(summary)),
    ]
    return [(title, sentences) for title, sentences in sections if sentences]


def compare(summary: Summary, a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any] | None:
    """Measure ``a`` minus measure ``b``, each ``(arm, key)``, within the seeds that have both; None where none has."""
    left, right = (summary["arms"].get(arm, {}).get(key, {}).get("seeds", {}) for arm, key in (a, b))
    gaps = [left[seed] - right[seed] for seed in left if seed in right]
    if not gaps:
        return None
    interval = t_interval(gaps)
    low, high = interval if interval is not None else (None, None)
    return {"mean": sum(gaps) / len(gaps), "low": low, "high": high, "n": len(gaps)}


def direction(change: Mapping[str, Any]) -> str:
    """``higher``, ``lower``, or ``not measurably different``; ``not judged`` with a single seed."""
    if change["low"] is None:
        return "not judged (one seed)"
    return "higher" if change["low"] > 0 else "lower" if change["high"] < 0 else "not measurably different"


def _says(summary: Summary, lead: str, a: tuple[str, str], b: tuple[str, str]) -> list[str]:
    change = compare(summary, a, b)
    if change is None:
        return []
    return [f"{lead}: {direction(change)}, {with_interval(change, sign=True)}."]


def _headlines(summary: Summary) -> list[str]:
    found = _says(
        summary, "Context alone: the untrained policy shown the HEK, against itself without",
        (UNTRAINED, "hek.seen.em"), (UNTRAINED, "without.seen.em"),
    )  # fmt: skip
    for arm in ("all", "half"):
        for label, key in ENDPOINTS.items():
            found += _says(summary, f"Endpoint, tested {label}: {arm} against {BASELINE}", (arm, key), (BASELINE, key))
        found += _says(
            summary, f"{arm} shown the HEK against the untrained policy shown it (what RL added)", (arm, "hek.seen.em"),
            (UNTRAINED, "hek.seen.em"),
        )  # fmt: skip
        found += _says(
            summary, f"{arm} shown the HEK against {BASELINE} without it (as they would be used)", (arm, "hek.seen.em"),
            (BASELINE, "without.seen.em"),
        )  # fmt: skip
        found += _says(
            summary, f"{arm} shown the HEK against {_LONGER} without it (the same with equally many rollouts in all)",
            (arm, "hek.seen.em"), (_LONGER, "without.seen.em"),
        )  # fmt: skip
    return found


def _reasons(summary: Summary) -> list[str]:
    """Where the HEK leaves something to be gained: which of retrieval, uptake and variance accounts for it."""
    found = []
    for arm in (UNTRAINED, "all"):
        for stratum in ("seen", "reworded"):
            found += _losses(summary, arm, stratum)
    followed = [
        f"{name} {share:.0%}"
        for name in summary["arms"]
        if (share := _mean(summary, name, "hek.seen.start.follows_right")) is not None
    ]
    found.append(f"Uptake, right lessons at the start that were followed, tested with the HEK: {', '.join(followed)}.")
    for arm in ("all", "half"):
        found += _weights(summary, arm)
    return found + _transfer(summary)


def _transfer(summary: Summary) -> list[str]:
    """Whether rollouts with the lesson taught those without it anything, at an equal number of the latter."""
    change = compare(summary, ("half", "reward_untold_plateau"), (BASELINE, "reward_midway"))
    if change is None or change["low"] is None:
        return []
    taught = {
        "higher": "the told rollouts of a group taught the untold ones something",
        "lower": "the told rollouts of a group stood in the way of the untold ones",
        "not measurably different": "the told rollouts of a group taught the untold ones nothing measurable",
    }[direction(change)]
    sentence = (
        f"Controls of half at the end against {BASELINE} half way, after as many rollouts without experience: training "
        f"reward {direction(change)}, {with_interval(change, sign=True)}: {taught}."
    )
    return [sentence]


def _weights(summary: Summary, arm: str) -> list[str]:
    """What training left in the weights, and whether there was a gradient to learn from."""
    gain = compare(summary, (arm, "without.seen.em"), (UNTRAINED, "without.seen.em"))
    keys = ("zero_variance_first", "advantage_var_first", "reward_first")
    own, base = ([one for key in keys if (one := _mean(summary, name, key)) is not None] for name in (arm, BASELINE))
    if gain is None or min(len(own), len(base)) < len(keys):
        return []
    sentence = (
        f"{arm}, weights alone, against the untrained policy, both without HEK: {direction(gain)}, "
        f"{with_interval(gain, sign=True)}. In the first fifth of training {own[0]:.0%} of its groups had no reward "
        f"variance and so no gradient ({base[0]:.0%} in {BASELINE}), at a reward of {own[2]:.2f} ({base[2]:.2f})."
    )
    against = compare(summary, (arm, "without.seen.em"), (BASELINE, "without.seen.em"))
    if against is not None and direction(against) == "lower" and own[0] > base[0]:
        sentence += " This fits its lag without the HEK: what the prompt already answers leaves nothing to learn from."
    return [sentence]


def _losses(summary: Summary, arm: str, stratum: str) -> list[str]:
    """What stands between a policy shown the HEK and the true lesson followed, as shares of the questions."""
    em, told, wrong = (_mean(summary, arm, f"hek.{stratum}.{key}") for key in ("em", "start.right", "start.inverted"))
    followed = _mean(summary, arm, f"hek.{stratum}.start.follows_right")
    if em is None or told is None or wrong is None or followed is None:
        return []
    retrieval, uptake = 1 - told, told * (1 - followed)
    larger = "retrieval" if retrieval >= uptake else "uptake"
    sentence = (
        f"{arm}, {stratum} families with the HEK: EM {em:.2f}. At the start {told:.0%} were shown the right lesson, "
        f"{wrong:.0%} its inversion; of those told right {followed:.0%} searched as told. Misses of retrieval touch "
        f"{retrieval:.0%} of the questions, misses of uptake {uptake:.0%}: {larger} is the larger limit."
    )
    return [sentence]


def _controls(summary: Summary) -> list[str]:
    found = []
    for control in _CONTROLS:
        for label, key in ENDPOINTS.items():
            found += _says(summary, f"all against {control}, tested {label}", ("all", key), (control, key))
        found += _says(
            summary, f"{control} against {BASELINE}, without HEK", (control, ENDPOINTS["without HEK"]),
            (BASELINE, ENDPOINTS["without HEK"]),
        )  # fmt: skip
        found += _says(
            summary, f"{control} against {BASELINE}, each shown what it was trained with", (control, AS_TRAINED),
            (BASELINE, AS_TRAINED),
        )  # fmt: skip
        found += _says(
            summary, f"all against {control}, each shown what it was trained with", ("all", AS_TRAINED),
            (control, AS_TRAINED),
        )  # fmt: skip
        found += _says(
            summary, f"Untrained policy shown {control}, against shown nothing", (UNTRAINED, f"{control}.seen.em"),
            (UNTRAINED, "without.seen.em"),
        )  # fmt: skip
    found += _prompt_effect(summary)
    found += _says(
        summary, "Oracle lessons against the HEK, both shown to the untrained policy", (UNTRAINED, "oracle.seen.em"),
        (UNTRAINED, "hek.seen.em"),
    )  # fmt: skip
    return found


def _prompt_effect(summary: Summary) -> list[str]:
    """Lines without any lesson to the point may help by themselves, and what is learnt beside them may stay there."""
    found = []
    for control in ("placebo", "plain"):
        beside = compare(summary, (control, AS_TRAINED), (BASELINE, AS_TRAINED))
        without = compare(summary, (control, "without.seen.em"), (control, AS_TRAINED))
        if beside is None or without is None:
            continue
        if direction(beside) == "higher":
            found.append(
                f"{control} says nothing about the questions and still beats {BASELINE} beside its own line: a line in "
                "the prompt alone loosens the habit of the trap, so part of any gain over none is not the lesson's."
            )
        if direction(without) == "lower":
            found.append(
                f"What {control} learnt is tied to its line: without it the same weights score "
                f"{with_interval(without, sign=True)}."
            )
    return found


def _variants(summary: Summary) -> list[str]:
    found = []
    for arm in ("e1", "e23", "oracle", "teacher"):
        for label, key in ENDPOINTS.items():
            found += _says(summary, f"{arm} against {BASELINE}, tested {label}", (arm, key), (BASELINE, key))
    for arm in (BASELINE, "all", "half"):
        for label, key in ENDPOINTS.items():
            found += _says(
                summary, f"GSPO against GRPO, 4 updates a step, {arm}, tested {label}", (f"gspo4-{arm}", key),
                (f"grpo4-{arm}", key),
            )  # fmt: skip
        found += _says(
            summary, f"Four updates a step against one, GRPO, {arm}, without HEK",
            (f"grpo4-{arm}", "without.seen.em"),
            (arm, "without.seen.em"),
        )  # fmt: skip
    for arm in (UNTRAINED, BASELINE, "all", "half"):
        found += _says(
            summary,
            f"Teacher's HEK against the own one, shown to {arm}",
            (arm, "teacher.seen.em"),
            (arm, "hek.seen.em"),
        )
    return found


def _generalisation(summary: Summary) -> list[str]:
    found = []
    for arm in ("all", "half"):
        for stratum in ("reworded", "unseen"):
            for label, condition in (("without HEK", "without"), ("with HEK", "hek")):
                key = f"{condition}.{stratum}.em"
                found += _says(summary, f"{stratum}, {label}: {arm} against {BASELINE}", (arm, key), (BASELINE, key))
    found += _says(
        summary, "Unseen families, untrained policy: shown the HEK, which knows nothing of them, against shown nothing",
        (UNTRAINED, "hek.unseen.em"), (UNTRAINED, "without.unseen.em"),
    )  # fmt: skip
    return found


def _stability(summary: Summary) -> list[str]:
    found = []
    for arm in ("all", "half"):
        for title, key in (
            ("advantage variance", "advantage_var"), ("share of zero-variance groups", "zero_variance_share"),
            ("gradient norm", "grad_norm"), ("CV of the gradient norm", "grad_norm_cv"),
        ):  # fmt: skip
            found += _says(summary, f"{title}, {arm} against {BASELINE}", (arm, key), (BASELINE, key))
    variance = compare(summary, ("all", "advantage_var"), (BASELINE, "advantage_var"))
    zero = compare(summary, ("all", "zero_variance_share"), (BASELINE, "zero_variance_share"))
    if variance and zero and direction(variance) == "lower" and direction(zero) == "higher":
        found.append(
            "The lower variance of all comes with more groups without any: it is mostly the absence of anything left "
            "to learn with the HEK in the prompt, not a steadier gradient."
        )
    return found


def _limits(summary: Summary) -> list[str]:
    leaks = sum(
        sum(values["seeds"].values())
        for found in summary["arms"].values()
        for key, values in found.items()
        if key.endswith(".leaks")
    )
    return [
        f"{len(summary['seeds'])} seed(s): intervals are wide, and none is corrected for the number of comparisons.",
        f"Test rollouts that were shown a line with their own answer: {int(leaks)}.",
        f"F1 and CEM differ from EM by at most {_metric_gap(summary):.3f} in any test: answers are one word.",
        "Not measured: coverage of the intervals, false promotions and retirements (the store is frozen).",
        "A tiny policy in a generated world, warm-started to read lessons: mechanisms, not any real model's accuracy.",
    ]


def _metric_gap(summary: Summary) -> float:
    """The largest difference between EM and another score in one test."""
    gaps = [
        abs(score - found[f"{key.removesuffix('.em')}.{other}"]["seeds"][seed])
        for found in summary["arms"].values()
        for key, values in found.items()
        if key.endswith(".em")
        for seed, score in values["seeds"].items()
        for other in ("f1", "cem")
    ]
    return max(gaps, default=0.0)


def _mean(summary: Summary, arm: str, key: str) -> float | None:
    value = summary["arms"].get(arm, {}).get(key)
    return None if value is None or value["mean"] is None else float(value["mean"])


def as_text(sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Markdown: headings and bullets."""
    return "\n".join(f"## {title}\n\n" + "".join(f"- {one}\n" for one in found) for title, found in sections)
