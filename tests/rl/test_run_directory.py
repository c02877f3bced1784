"""Run directories: runs of older versions go on, damaged evaluations are named, a lock keeps a second process out."""

from __future__ import annotations

import json

import pytest

from hiexp.evidence.config import EvidenceConfig
from hiexp.io import DataError
from hiexp.rl.config import TrainConfig
from hiexp.rl.config_parse import read_yaml
from hiexp.rl.run_directory import RunDirectory, claim, directory_lock


@pytest.mark.parametrize("content", [b"", b'{"without_hek": {', b"\xff", b"[]", b'{"step": 0}'])
def test_a_damaged_evaluation_is_named(tmp_path, content):
    directory = RunDirectory(TrainConfig.from_dict({"run": {"dir": str(tmp_path / "run")}}))
    with directory.locked():
        assert directory.read_evaluation(0) is None
        directory.write_evaluation(0, {"without_hek": {"em": 0.5}, "with_hek": None})
        assert directory.read_evaluation(0) == {"without_hek": {"em": 0.5}, "with_hek": None}
        (tmp_path / "run" / "eval" / "step_000000.json").write_bytes(content)
        with pytest.raises(DataError, match=r"eval/step_000000\.json: .* delete it to evaluate again"):
            directory.read_evaluation(0)


def forget(file, *keys):
    """Take settings out of a file, as if they had not existed when it was written."""
    values = read_yaml(file, [])
    for *stages, name in (key.split(".") for key in keys):
        inner = values
        for stage in stages:
            inner = inner[stage]
        del inner[name]
    file.write_text(json.dumps(values))  # JSON is YAML


def test_a_run_of_an_older_version_goes_on(tmp_path):
    settings = {"run": {"dir": str(tmp_path / "run")}, "algorithm": {"lr": 1e-4}}
    file = tmp_path / "run" / "config.resolved.yaml"
    with RunDirectory(TrainConfig.from_dict(settings)).locked():
        forget(file, "rollout.staleness", "credit", "alarms.kl")
    with RunDirectory(TrainConfig.from_dict(settings)).locked():
        assert read_yaml(file, []) == TrainConfig.from_dict(settings).to_dict()
        assert not (tmp_path / "run" / "config.changes.jsonl").exists()
        forget(file, "rollout.staleness", "credit")
    changed = {**settings, "rollout": {"staleness": 2}, "credit": {"drop_truncated": True}, "algorithm": {"lr": 1e-3}}
    with pytest.raises(ValueError, match=r"another config \((.*)\)") as caught:
        RunDirectory(TrainConfig.from_dict(changed))
    named = ["algorithm.lr: 0.0001 -> 0.001", "credit.drop_truncated: False -> True", "rollout.staleness: 0 -> 2"]
    assert sorted(str(caught.value).split("(")[1].split(")")[0].split("; ")) == named


def test_a_study_of_an_older_version_goes_on(tmp_path):
    file = tmp_path / "evidence.yaml"
    claim(file, EvidenceConfig(), "a study")
    forget(file, "trapped", "train.rollout.staleness", "train.credit", "warm_start.steps")
    claim(file, EvidenceConfig(), "a study")
    assert read_yaml(file, []) == EvidenceConfig().to_dict()
    # What the study chooses otherwise than a run does cannot have been chosen before there was a choice.
    forget(file, "train.run.steps")
    with pytest.raises(ValueError, match=r"holds a study with other settings \(train\.run\.steps: 100 -> 60\)"):
        claim(file, EvidenceConfig(), "a study")


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with directory_lock(tmp_path), pytest.raises(ValueError, match="another process"), directory_lock(tmp_path):
            pass


@pytest.mark.parametrize(("kind", "same"), [("grpo", True), ("dapo", True), ("gspo", False), ("cispo", False)])
def test_a_run_from_before_the_kinds_had_clip_ranges_keeps_its_own(tmp_path, kind, same):
    """Its file says 0.2: the same for grpo, another range for gspo."""
    algorithm = {"kind": kind, "clip_low": 0.2}
    settings = {"algorithm": algorithm, "run": {"dir": str(tmp_path / "run")}}
    with RunDirectory(TrainConfig.from_dict(settings)).locked():
        pass
    RunDirectory(TrainConfig.from_dict(settings))
    del algorithm["clip_low"]
    if same:
        with RunDirectory(TrainConfig.from_dict(settings)).locked():
            pass
        assert not (tmp_path / "run" / "config.changes.jsonl").exists()
    else:
        with pytest.raises(ValueError, match=r"another config \(algorithm.clip_low: 0.2 -> None\); restore"):
            RunDirectory(TrainConfig.from_dict(settings))
    algorithm["clip_low"] = 0.1
    with pytest.raises(ValueError, match=r"algorithm.clip_low: .* -> 0.1"):
        RunDirectory(TrainConfig.from_dict(settings))
