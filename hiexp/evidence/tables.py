"""The study as Markdown tables: means over seeds, intervals in brackets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hiexp.evidence.config import ARMS, UNTRAINED
from hiexp.evidence.results import AS_TRAINED, BASELINE, ENDPOINTS, THRESHOLDS
from hiexp.evidence.task import STRATA
from hiexp.report.markup import number

Summary = Mapping[str, Any]
_ABOUT = {UNTRAINED: "warm start without RL"} | {name: arm.about for name, arm in ARMS.items()}


def markdown(summary: Summary) -> str:
    """All tables under their headings."""
    sections = [
        ("Endpoints", _endpoints(summary)),
        ("Learning", _learning(summary)),
        ("Steadiness and cost", _steadiness(summary)),
        ("Families and wordings", _strata(summary)),
        ("What policies were tested with", _conditions(summary)),
        ("Uptake: the HEK in a test, served and followed", _uptake(summary)),
        ("The stores against the latent lessons", _stores(summary)),
    ]
    return "\n".join(f"## {title}\n\n{_table(*body)}\n" for title, body in sections)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


Body = tuple[Sequence[str], Sequence[Sequence[str]], str]


def _endpoints(summary: Summary) -> Body:
    rows = []
    for name, found in summary["arms"].items():
        change = summary["differences"].get(name, {})
        rows.append([
            name, _ABOUT[name],
            *(with_interval(found.get(key)) for key in ENDPOINTS.values()),
            *(with_interval(change.get(key), sign=True) for key in (*ENDPOINTS.values(), AS_TRAINED)),
            with_interval(found.get(AS_TRAINED)),
            str(found[ENDPOINTS["without HEK"]]["n"]),
        ])  # fmt: skip
    header = [
        "arm", "what", *(f"test EM {one}" for one in ENDPOINTS), *(f"{one}: minus {BASELINE}" for one in ENDPOINTS),
        f"as trained: minus {BASELINE}", "as trained", "seeds",
    ]  # fmt: skip
    return (
        header,
        rows,
        (
            "Trained families in trained wordings, new worlds; the HEK shown in full. 95% intervals (Student's t over "
            f"seeds); differences are taken within a seed, same warm start and worlds as {BASELINE}. As trained: shown "
            f"in the test what the arm was shown in training ({BASELINE}: nothing)."
        ),
    )


def _learning(summary: Summary) -> Body:
    rows = [
        [
            name, *(plain(found.get(key)) for key in ("reward_first", "reward_plateau", "reward_auc")),
            with_interval(summary["differences"].get(name, {}).get("reward_auc"), sign=True),
            *(_reached(found.get(f"steps_to_{threshold:g}"), found["reward_auc"]["n"]) for threshold in THRESHOLDS),
            plain(found.get("reward_untold_plateau")),
        ]
        for name, found in _trained(summary)
    ]  # fmt: skip
    header = [
        "arm", "reward, first 20% of steps", "plateau, last 20%", "AUC", f"AUC minus {BASELINE}",
        *(f"steps to {threshold:g}" for threshold in THRESHOLDS), "plateau of controls in the group",
    ]  # fmt: skip
    return (
        header,
        rows,
        (
            "Rewards of arms with experience are earned with it in the prompt: their height is context as much as "
            "learning. AUC is the mean reward over all steps. Steps to a reward: mean of the seeds that reached it, "
            "and how many did."
        ),
    )


def _steadiness(summary: Summary) -> Body:
    keys = (
        ("advantage variance", "advantage_var", 3), ("its last 20%", "advantage_var_last", 3),
        ("zero-variance groups", "zero_variance_share", 2), ("their last 20%", "zero_variance_last", 2),
        ("gradient norm", "grad_norm", 2), ("its CV", "grad_norm_cv", 2), ("clipped tokens", "clip_fraction", 3),
        ("KL to the start, without", "without.kl", 3), ("KL, with HEK", "hek.kl", 3),
        ("searches per answer", "without.seen.searches", 2),
        ("repeated queries", "without.seen.duplicate_queries", 3), ("seconds of training", "seconds", 0),
    )  # fmt: skip
    rows = [[name, *(plain(found.get(key), digits) for _, key, digits in keys)] for name, found in _trained(summary)]
    return (
        ["arm", *(title for title, _, _ in keys)],
        rows,
        (
            "Variance of reward minus group mean, before the division by the group's standard deviation. Low variance "
            "can mean steady learning or groups with nothing left to learn from: read it with the share of "
            "zero-variance groups. Gradient norm: of the loss over all rollouts of a step, 0 where none is trained. KL "
            "in nats per sampled token, on test rollouts. Seconds: on a shared machine."
        ),
    )


def _strata(summary: Summary) -> Body:
    rows = [
        [name, *(with_interval(found.get(f"{condition}.{s}.em")) for condition in ("without", "hek") for s in STRATA)]
        for name, found in summary["arms"].items()
    ]
    header = ["arm", *(f"{s}, {label}" for label in ("without", "with HEK") for s in STRATA)]
    return (
        header,
        rows,
        (
            "Test EM. Seen: trained families and wordings. Reworded: trained families in wordings that neither "
            "training nor the store has met. Unseen: families that neither has met; the store has nothing true to say "
            "about them."
        ),
    )


def _conditions(summary: Summary) -> Body:
    names = list(
        dict.fromkeys(key.split(".")[0] for found in summary["arms"].values() for key in found if ".seen." in key)
    )
    rows = [
        [name, *(plain(found.get(f"{condition}.seen.em")) for condition in names)]
        for name, found in summary["arms"].items()
    ]
    return ["policy", *names], rows, "Test EM on trained families; a column is what the policy was shown in the test."


def _uptake(summary: Summary) -> Body:
    keys = ("start.right", "start.inverted", "start.follows_right", "start.follows_inverted", "start.right_untold",
            "tool.right", "tool.inverted", "tool.follows_right", "tool.follows_inverted")  # fmt: skip
    rows = [
        [name, stratum, *(plain(found.get(f"hek.{stratum}.{key}")) for key in keys), _leaks(found)]
        for name, found in summary["arms"].items()
        for stratum in STRATA
    ]
    header = ["arm", "families", *(key.replace(".", ": ").replace("_", " ") for key in keys), "leaks, all tests"]
    return (
        header,
        rows,
        (
            "Right and inverted: share of rollouts whose nearest line about their attributes said so. Follows: share "
            "of those that did as told, in the search (start) or in the answer (tool). Right untold: share that "
            "searched for the right attribute with no such line."
        ),
    )


def _leaks(found: Mapping[str, Any]) -> str:
    """Rollouts, over all seeds, conditions and strata, that were shown a line with their answer in it."""
    counts = [values for key, values in found.items() if key.endswith(".leaks")]
    return str(int(sum(sum(values["seeds"].values()) for values in counts)))


def _stores(summary: Summary) -> Body:
    keys = {
        "rollouts": "rollouts", "questions with both outcomes": "contrastive", "all wrong": "all_wrong",
        "all right": "all_right", "E1": "sizes.E1", "E2": "sizes.E2", "E3": "sizes.E3",
        **{f"{level} right": f"precision.{level}.right" for level in ("E1", "E2", "E3")},
        **{f"{level} inverted": f"precision.{level}.inverted" for level in ("E1", "E2", "E3")},
        **{
            f"retrieved at {place}, {stratum}: {one}": f"retrieval_{place}.{stratum}.{one}"
            for place in ("start", "search") for stratum in STRATA for one in ("right", "inverted", "none")
        },
        "quarantined": "quarantined", "entries that hold an answer": "leaking_entries",
    }  # fmt: skip
    stores = {name: found for name, found in summary["stores"].items() if found}
    rows = [[title, *(_amount(key, found.get(key)) for found in stores.values())] for title, key in keys.items()]
    return (
        ["measure", *stores],
        rows,
        (
            "hek: from the warm start's own rollouts. teacher: from rollouts of the oracle-trained policy, half of "
            "each group told the true lesson. Retrieval: the nearest of the lines served that is about the question's "
            "attributes."
        ),
    )


def _amount(key: str, value: Mapping[str, Any] | None) -> str:
    """A share with its interval, a count as a whole number."""
    return with_interval(value) if key.startswith(("precision", "retrieval")) else plain(value, 0)


def _trained(summary: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, found) for name, found in summary["arms"].items() if name != UNTRAINED]


def plain(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """The mean."""
    return number(None if value is None else value["mean"], digits)


def with_interval(value: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """``0.80 [0.75, 0.85]``; the mean alone where there is no interval."""
    if value is None or value["mean"] is None:
        return "–"
    form = "{:+z.2f}" if sign else "{:z.2f}"
    text = form.format(value["mean"])
    if value["low"] is None:
        return text
    return f"{text} [{form.format(value['low'])}, {form.format(value['high'])}]"


def _reached(value: Mapping[str, Any] | None, seeds: int) -> str:
    if value is None or value["mean"] is None:
        return f"– (0/{seeds})"
    return f"{value['mean']:.0f} ({value['n']}/{seeds})"
