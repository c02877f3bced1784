"""The verdict follows the numbers, whichever way they point."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiexp.evidence.results import collect
from hiexp.evidence.tables import markdown
from hiexp.evidence.verdict import verdict

from .test_results import write_study


def sentences(summary) -> str:
    return "\n".join(sentence for _, found in verdict(summary) for sentence in found)


def study(tmp_path: Path, gain: float) -> dict:
    """``all`` minus ``none`` is ``gain`` without the HEK, give or take 0.01, in three seeds; nothing with it."""
    scores = {
        seed: {"none": (0.5 + wobble, 0.6), "all": (0.5 + gain, 0.6), "half": (0.5 + gain, 0.6)}
        for seed, wobble in enumerate((-0.01, 0.0, 0.01))
    }
    return collect(write_study(tmp_path / "study", scores))


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.3, "higher, +0.30"), (-0.3, "lower, -0.30"), (0.0, "not measurably different, +0.00")]
)
def test_endpoints_are_judged_by_their_intervals(tmp_path: Path, gain: float, expected: str):
    text = sentences(study(tmp_path, gain))
    assert f"Endpoint, tested without HEK: all against none: {expected}" in text
    assert "Endpoint, tested with HEK: all against none: not measurably different, +0.00 [+0.00, +0.00]" in text
    assert "Not finished: seed" not in text


def test_one_seed_is_not_judged(tmp_path: Path):
    text = sentences(collect(write_study(tmp_path / "study", {0: {"none": (0.1, 0.2), "all": (0.9, 0.9)}})))
    assert "tested without HEK: all against none: not judged (one seed), +0.80." in text


def test_partial_results_say_so_first(tmp_path: Path):
    scores = {0: {"none": (0.1, 0.2), "all": (0.9, 0.9)}, 1: {"none": (0.1, 0.2)}}
    study = write_study(tmp_path / "study", scores)
    (study / "seed_2").mkdir()
    summary = collect(study)
    title, found = verdict(summary)[0]
    assert title == "Partial results"
    assert found[:2] == ["Not finished: seed 1: all.", "Not finished: seed 2: none, all."]
    assert summary["seeds"] == [0, 1]


def reasons(summary) -> list[str]:
    return dict(verdict(summary))["Why"]


def constant(value: float) -> dict:
    return {"mean": value, "low": value, "high": value, "n": 3, "seeds": {str(seed): value for seed in range(3)}}


@pytest.mark.parametrize(("told", "followed", "limit"), [(0.6, 0.9, "retrieval"), (0.95, 0.5, "uptake")])
def test_the_larger_limit_is_named(tmp_path: Path, told: float, followed: float, limit: str):
    summary = study(tmp_path, 0.0)
    shares = {"start.right": told, "start.inverted": 0.05, "start.follows_right": followed}
    summary["arms"]["all"] |= {f"hek.seen.{key}": constant(value) for key, value in shares.items()}
    (sentence,) = (one for one in reasons(summary) if one.startswith("all, seen families"))
    assert sentence.endswith(f"{limit} is the larger limit.")


@pytest.mark.parametrize(("own", "explained"), [(0.9, True), (0.1, False)])
def test_missing_variance_explains_a_lag_only_where_it_is_missing(tmp_path: Path, own: float, explained: bool):
    summary = study(tmp_path, -0.3)
    summary["arms"]["untrained"] = {f"without.seen.{key}": constant(0.2) for key in ("em", "f1", "cem")}
    summary["arms"]["all"]["zero_variance_first"] = constant(own)
    summary["arms"]["none"]["zero_variance_first"] = constant(0.3)
    (sentence,) = (one for one in reasons(summary) if one.startswith("all, weights alone"))
    assert ("what the prompt already answers leaves nothing to learn from" in sentence) is explained


@pytest.mark.parametrize(
    ("controls", "taught"), [(0.7, "something"), (0.3, "stood in the way"), (0.5, "nothing measurable")]
)
def test_controls_are_compared_at_equal_numbers_of_untold_rollouts(tmp_path: Path, controls: float, taught: str):
    summary = study(tmp_path, 0.0)
    summary["arms"]["half"]["reward_untold_plateau"] = constant(controls)
    (sentence,) = (one for one in reasons(summary) if one.startswith("Controls of half"))
    assert taught in sentence


def test_a_gain_of_lines_that_say_nothing_is_pointed_out(tmp_path: Path):
    summary = study(tmp_path, 0.0)
    scores = {"as trained.seen": 0.8, "without.seen": 0.3}
    summary["arms"]["plain"] = {
        f"{key}.{metric}": constant(value) for key, value in scores.items() for metric in ("em", "f1", "cem")
    }
    text = sentences(summary)
    assert "plain says nothing about the questions and still beats none beside its own line" in text
    assert "What plain learnt is tied to its line: without it the same weights score -0.50" in text


def test_tables_hold_every_arm_and_their_differences(tmp_path: Path):
    text = markdown(study(tmp_path, 0.3))
    rows = [line for line in text.splitlines() if line.startswith("| all | frozen HEK in every rollout |")]
    assert len(rows) == 1
    assert "0.80 [0.80, 0.80]" in rows[0]
    assert "+0.30 [+0.28, +0.32]" in rows[0]
