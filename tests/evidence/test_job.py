"""The whole study in seconds: its files, continuing after a kill, partial results, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hiexp import evidence_command
from hiexp.evidence import job, study
from hiexp.evidence.config import ARMS, EvidenceConfig, check_arms
from hiexp.evidence.job import evidence
from hiexp.evidence.page import write_results
from hiexp.io import read_jsonl
from hiexp.rl.run_directory import RunDirectory

from .conftest import TINY_ARMS, tiny

CONDITIONS = {
    "untrained": {"without", "hek", "teacher", "oracle", "e1", "e23", "placebo", "shuffled", "plain"},
    "oracle": {"without", "hek", "oracle"},
    "none": {"without", "hek", "teacher"},
    "half": {"without", "hek", "teacher"},
    "teacher": {"without", "hek", "teacher"},
}


def measures(out: Path) -> dict[str, dict]:
    """Every test's measures but for its time."""
    found = {}
    for path in sorted(out.glob("seed_*/tests/*/[!.]*/measures.json")):
        values = json.loads(path.read_text())
        assert values.pop("seconds") > 0
        found[str(path.relative_to(out))] = values
    return found


def test_every_arm_is_trained_and_tested_under_its_conditions(finished: Path):
    tests = finished / "seed_0" / "tests"
    assert {arm.name: {path.name for path in arm.iterdir()} for arm in tests.iterdir()} == CONDITIONS
    for arm in TINY_ARMS:
        rows = [row for _, row in read_jsonl(finished / "seed_0" / "arms" / arm / "metrics.jsonl")]
        assert [row["step"] for row in rows] == [1, 2]
    for store in ("hek", "teacher"):
        report = json.loads((finished / "seed_0" / store / "report.json").read_text())
        assert report["rollouts"] == 32
        assert report["leaking_entries"] == 0


def test_results_are_written_from_the_numbers(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == set(CONDITIONS)
    assert summary["seeds"] == [0]
    assert [line for line in summary["missing"] if line.startswith("seed")] == []
    for name in ("curves.png", "endpoints.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"
    text, page = (finished / "results.md").read_text(), (finished / "results.html").read_text()
    assert text.count("\n## ") == page.count("<h2>") > 10
    assert "Test rollouts that were shown a line with their own answer: 0." in text


def test_half_of_each_group_is_shown_experience(finished: Path):
    file = finished / "seed_0" / "arms" / "half" / "rollouts" / "step_000001.jsonl.gz"
    for _, row in read_jsonl(file):
        if int(row["rollout_id"].rsplit("/", 1)[1]) >= 2:
            assert row["injections"] == []


def test_a_killed_study_continues_and_ends_the_same(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, write = tmp_path / "study", RunDirectory.write_rollouts
    trials = study.run_trial

    def killed_in_step_two(self, step, rollouts):
        if step == 2:
            raise KeyboardInterrupt
        write(self, step, rollouts)

    def killed_in_a_test(*arguments):
        trials(*arguments)
        raise KeyboardInterrupt

    for kill in ((RunDirectory, "write_rollouts", killed_in_step_two), (study, "run_trial", killed_in_a_test)):
        with monkeypatch.context() as patch:
            patch.setattr(*kill)
            with pytest.raises(KeyboardInterrupt):
                evidence(tiny(), out, [0], ("oracle", "none"), say=lambda line: None)
    assert not (out / "summary.json").exists()
    evidence(tiny(), out, [0], ("oracle", "none"), say=lambda line: None)
    expected, found = measures(finished), measures(out)
    shared = {
        path: values for path, values in expected.items() if "/half/" not in path and "/tests/teacher/" not in path
    }
    assert found == shared


def test_arms_can_be_added_later_and_partial_results_are_labelled(finished: Path, tmp_path: Path):
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "seed_0" / "tests" / "half" / "hek")
    shutil.copytree(out / "seed_0", out / "seed_1")
    shutil.rmtree(out / "seed_1" / "tests" / "none")
    page = write_results(out, tmp_path / "elsewhere")
    assert "Not finished: seed 1: none." in page.read_text()
    evidence(tiny(), out, [0], ("none", "half"), say=lambda line: None)
    assert measures(out)["seed_0/tests/half/hek/measures.json"] == measures(finished)[
        "seed_0/tests/half/hek/measures.json"
    ]  # fmt: skip


def test_what_is_refused(finished: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"other settings \(trapped: 0\.7 -> 0\.5\)"):
        evidence(replace(tiny(), trapped=0.5), finished, [0], say=lambda line: None)
    with pytest.raises(ValueError, match="--arms: expected names among oracle, none"):
        check_arms(["nobody"])
    with pytest.raises(ValueError, match="teacher needs oracle"):
        check_arms(["none", "teacher"])
    with pytest.raises(ValueError, match=r"seeds: expected different numbers from 0, got \[1, 1\]"):
        evidence(tiny(), tmp_path / "new", [1, 1], say=lambda line: None)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="trapped: expected a number <= 1, got 2"):
        EvidenceConfig(trapped=2)


def test_options_reach_the_job(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seen = []
    monkeypatch.setattr(job, "evidence", lambda config, out, seeds, arms, say: seen.append((config, out, seeds, arms)))
    parser = argparse.ArgumentParser()
    evidence_command.register(parser.add_subparsers())

    def run(*options: str) -> int:
        arguments = parser.parse_args(["evidence", *options])
        return arguments.func(arguments)

    assert run("--short", "--seeds", "2", "--arms", "none,all", "--steps", "5", "--out", "x") == 0
    short = EvidenceConfig().short()
    expected = replace(short, train=replace(short.train, run=replace(short.train.run, steps=5)))
    assert seen == [(expected, "x", range(2), ["none", "all"])]
    assert run() == 0
    assert seen[1] == (EvidenceConfig(), "runs/evidence", range(5), list(ARMS))
    assert run("--tables", "--out", str(finished), "--results", str(tmp_path / "results")) == 0
    assert (tmp_path / "results" / "results.md").read_text() == (finished / "results.md").read_text()
    assert len(seen) == 2
    for options, error in (
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--results", "x"], "--tables with it"),
    ):
        with pytest.raises(ValueError, match=error):
            run(*options)
