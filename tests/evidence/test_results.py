"""From files to numbers: measures of a run, pairing within seeds, intervals, and what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hiexp.evidence.config import EvidenceConfig
from hiexp.evidence.results import AS_TRAINED, BASELINE, ENDPOINTS, collect, training_measures
from hiexp.io import DataError

STEPS = 10


def metrics(rewards: list[float], **values: float) -> list[dict]:
    row = {"advantage_var_raw": 0.1, "zero_variance_share": 0.5, "grad_norm": 1.0, "seconds_step": 2.0, **values}
    return [{"step": i + 1, "reward_mean": reward, **row} for i, reward in enumerate(rewards)]


def write_study(
    out: Path, scores: dict[int, dict[str, tuple[float, float]]], unfinished: tuple[int, str] = (-1, "")
) -> Path:
    """Files of a study: seed -> arm -> (EM without, EM with the HEK)."""
    out.mkdir()
    (out / "evidence.yaml").write_text(f"train:\n  run:\n    steps: {STEPS}\n")
    for seed, arms in scores.items():
        for arm, ems in arms.items():
            for condition, em in zip(("without", "hek"), ems, strict=True):
                folder = out / f"seed_{seed}" / "tests" / arm / condition
                folder.mkdir(parents=True)
                (folder / "measures.json").write_text(
                    json.dumps({"seen": {"em": em, "f1": em, "cem": em, "leaks": 0}, "kl": 0.5})
                )
            run = out / f"seed_{seed}" / "arms" / arm
            run.mkdir(parents=True)
            rows = metrics([0.5] * (STEPS - 1 if (seed, arm) == unfinished else STEPS))
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_measures_of_a_run():
    found = training_measures(metrics([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 1.0, 0.8]))
    assert found["reward_auc"] == pytest.approx(0.62)
    assert found["reward_first"] == pytest.approx(0.1)
    assert found["reward_plateau"] == pytest.approx(0.9)
    assert found["reward_midway"] == pytest.approx(0.7)
    # Means of five steps: 0.40 at step 5, 0.56 at step 6, ..., 0.80 at step 9 at the earliest.
    assert found["steps_to_0.5"] == 6
    assert found["steps_to_0.8"] == 9
    assert (found["seconds"], found["grad_norm_cv"], found["advantage_var"]) == (20.0, 0.0, pytest.approx(0.1))
    assert found["grad_norm"] == 0.5  # half of the groups had nothing to train on
    assert training_measures(metrics([0.1] * 10))["steps_to_0.5"] is None
    assert training_measures(metrics([0.9] * 3))["steps_to_0.5"] is None


def test_a_step_without_update_has_no_gradient():
    rows = metrics([1.0, 1.0], zero_variance_share=0.0)
    rows[1] |= {"grad_norm": None, "zero_variance_share": 1.0}
    assert training_measures(rows)["grad_norm"] == 0.5


def test_differences_are_paired_within_seeds(tmp_path: Path):
    scores = {
        0: {"none": (0.1, 0.5), "all": (0.2, 0.8)},
        1: {"none": (0.5, 0.5), "all": (0.7, 0.6)},
        2: {"none": (0.9, 0.5)},
    }
    summary = collect(write_study(tmp_path / "study", scores))
    own = summary["arms"][BASELINE][ENDPOINTS["without HEK"]]
    assert (own["mean"], own["n"]) == (pytest.approx(0.5), 3)
    change = summary["differences"]["all"][ENDPOINTS["without HEK"]]
    assert change["seeds"] == {"0": pytest.approx(0.1), "1": pytest.approx(0.2)}
    # Two values: t with one degree of freedom, whose 97.5% quantile is tan(0.475 pi).
    half = math.tan(0.475 * math.pi) * 0.05
    assert (change["low"], change["high"]) == (pytest.approx(0.15 - half), pytest.approx(0.15 + half))
    assert summary["missing"][0] == "seed 2: all"
    # As trained: all with the HEK against none without it.
    assert summary["differences"]["all"][AS_TRAINED]["seeds"] == {"0": pytest.approx(0.7), "1": pytest.approx(0.1)}


def test_an_arm_counts_once_it_is_trained_to_the_end_and_tested(tmp_path: Path):
    scores = {0: {"none": (0.1, 0.5), "all": (0.2, 0.8)}, 1: {"none": (0.1, 0.5), "all": (0.2, 0.8)}}
    study = write_study(tmp_path / "study", scores, unfinished=(1, "all"))
    (study / "seed_0" / "tests" / "none" / "hek").rename(study / "seed_0" / "tests" / "none" / ".hek.tmp")
    summary = collect(study)
    assert summary["missing"][:2] == ["seed 0: none", "seed 1: all"]
    assert summary["missing"][2].startswith("any seed: oracle, half, e1")
    assert list(summary["curves"]["all"]) == ["0"]
    assert summary["differences"]["all"] == {}


def test_no_study_and_nothing_finished_are_told_apart(tmp_path: Path):
    with pytest.raises(DataError, match="expected a study, made by hiexp evidence --out"):
        collect(tmp_path)
    with pytest.raises(DataError, match="nothing is finished yet"):
        collect(write_study(tmp_path / "study", {}))


def test_a_damaged_file_is_named(tmp_path: Path):
    study = write_study(tmp_path / "study", {0: {"none": (0.1, 0.5)}})
    file = study / "seed_0" / "tests" / "none" / "hek" / "measures.json"
    file.write_text("{")
    with pytest.raises(DataError, match=r"hek/measures\.json: not valid JSON .* delete its folder"):
        collect(study)


def test_an_arm_with_more_steps_is_finished_at_its_own_last_one(tmp_path: Path):
    scores = {seed: {"none": (0.1, 0.2), "none-longer": (0.1, 0.2)} for seed in (0, 1)}
    out = write_study(tmp_path / "study", scores)
    steps = EvidenceConfig().arm_steps("none-longer") - EvidenceConfig().arm_steps("none") + STEPS
    path = out / "seed_0" / "arms" / "none-longer" / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in metrics([0.5] * steps)))
    summary = collect(out)
    assert summary["missing"][0] == "seed 1: none-longer"
    assert {seed: len(curve) for seed, curve in summary["curves"]["none-longer"].items()} == {"0": steps}
