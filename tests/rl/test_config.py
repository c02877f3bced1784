"""Config: every field documented, round trip, and each kind of user mistake refused by key path."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from hiexp.io import DataError
from hiexp.rl.config import TrainConfig
from hiexp.rl.config_parse import changed_settings, describe, differing_keys, dump_yaml, read_yaml


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_has_a_sentence_and_stages_stay_small():
    rows = list(describe(TrainConfig))
    assert len(rows) > 50
    assert [key for key, _, sentence in rows if not sentence.endswith(".")] == []
    for stage in dataclasses.fields(TrainConfig):
        assert len(dataclasses.fields(stage.default_factory)) <= 25


def test_dict_and_yaml_round_trip(tmp_path):
    config = TrainConfig.from_dict({"rollout": {"group_size": 4}, "algorithm": {"betas": [0.9, 0.95], "lr": 1}})
    assert config.algorithm.lr == 1.0
    assert isinstance(config.algorithm.lr, float)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_yaml(write(tmp_path, dump_yaml(config))) == config


def test_floats_without_a_dot_are_numbers(tmp_path):
    assert TrainConfig.from_yaml(write(tmp_path, "algorithm: {lr: 1e-6}")).algorithm.lr == 1e-6


def test_overrides_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HIEXP_TEST_DIR", "/data")
    path = write(tmp_path, "task: {train: '${HIEXP_TEST_DIR}/a.jsonl', evaluation: '${HIEXP_NOT_SET:-x}/b.jsonl'}")
    config = TrainConfig.from_yaml(path, ["run.steps=7", "experience.hek=null", "rollout.temperature=0.5"])
    assert (config.task.train, config.task.evaluation) == ("/data/a.jsonl", "x/b.jsonl")
    assert (config.run.steps, config.experience.hek, config.rollout.temperature) == (7, None, 0.5)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rollout": {"group_sise": 4}}, ValueError, "unknown key rollout.group_sise; did you mean rollout.group_size"),
        ({"rolout": {}}, ValueError, "unknown key rolout; did you mean rollout"),
        ({"rollout": {"group_size": "4"}}, TypeError, "rollout.group_size: expected int, got str '4'"),
        ({"rollout": {"group_size": True}}, TypeError, "rollout.group_size: expected int, got bool"),
        ({"rollout": {"group_size": 4.0}}, TypeError, "rollout.group_size: expected int, got float"),
        ({"rollout": 3}, TypeError, "rollout: expected a mapping, got int"),
        ({"rollout": {"group_size": 1}}, ValueError, "rollout.group_size: expected a number >= 2, got 1"),
        ({"rollout": {"temperature": 0}}, ValueError, "rollout.temperature: expected a number > 0, got 0"),
        ({"rollout": {"temperature": float("nan")}}, ValueError, "rollout.temperature: expected a number > 0, got nan"),
        ({"rollout": {"top_p": 1.5}}, ValueError, "rollout.top_p: expected a number <= 1, got 1.5"),
        ({"algorithm": {"kind": "gpro"}}, ValueError, "algorithm.kind: expected one of .*got 'gpro'; did you mean"),
        ({"algorithm": {"betas": 0.9}}, TypeError, "algorithm.betas: expected a list, got float"),
        ({"algorithm": {"betas": [0.9]}}, ValueError, "algorithm.betas: expected two numbers"),
        ({"algorithm": {"betas": [0.9, "x"]}}, TypeError, r"algorithm.betas\[1\]: expected float, got str"),
        ({"task": {"kind": "maths"}}, ValueError, "task.metric: expected 'accuracy'"),
        ({"task": {"train": "${HIEXP_NOT_SET}/a"}}, ValueError, "HIEXP_NOT_SET is not set"),
        ({"experience": {"start_levels": ["E4"]}}, ValueError, "experience.start_levels"),
        ([], TypeError, "expected a mapping, got list"),
    ],
)
def test_mistakes_are_named(values, error, message):
    with pytest.raises(error, match=message):
        TrainConfig.from_dict(values, "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("- 1\n- 2\n", "expected a YAML mapping, got list"),
        ("run:\n  steps: [1\n", "config.yaml:.*not valid YAML"),
        ("run:\n  steps: 1\n  steps: 2\n", "config.yaml:3: key 'steps' appears twice"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_yaml(write(tmp_path, text), [])


def test_missing_and_wrongly_encoded_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        TrainConfig.from_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: '\xe9'}")
    with pytest.raises(DataError, match="not valid UTF-8"):
        TrainConfig.from_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["run.steps", "=3", "run.steps.deep=3"])
def test_bad_overrides(tmp_path, override):
    with pytest.raises(ValueError, match="--set"):
        read_yaml(write(tmp_path, "run: {steps: 2}"), [override])


def test_differing_keys_lists_leaves():
    old, new = TrainConfig().to_dict(), TrainConfig.from_dict({"run": {"seed": 3}}).to_dict()
    assert differing_keys(old, new, {}) == ["run.seed: 0 -> 3"]
    assert differing_keys(old, old, {}) == []
    assert differing_keys({}, new, old) == ["run.seed: 0 -> 3"]
    assert differing_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": {"d": 2}}}, {}) == ["a.c: None -> {'d': 2}"]


@pytest.mark.parametrize("key", [key for key, _, _ in describe(TrainConfig)])
def test_a_setting_that_is_not_stored_counts_as_its_default(key):
    stage, name = key.split(".")
    stored = TrainConfig().to_dict()
    default = stored[stage].pop(name)
    assert changed_settings(stored, TrainConfig()) == []
    settings = {"task.kind": "miniworld", "algorithm.kind": "dapo", "run.seed": 5}
    config = TrainConfig.from_dict({stage: {name: settings[key]}} if key in settings else {})
    expected = [f"{key}: {default!r} -> {settings[key]!r}"] if key in settings else []
    assert changed_settings(stored, config) == expected
    del stored[stage]  # a whole stage that came later
    assert changed_settings(stored, config) == expected


def test_stored_settings_that_differ_or_are_gone_are_named():
    stored = {"run": {"seed": 3, "old": 1}, "algorithm": {"lr": 1e-6}}
    assert changed_settings(stored, TrainConfig()) == ["run.seed: 3 -> 0", "run.old: 1 -> None"]


def test_reading_a_config_imports_no_torch():
    code = "import sys, hiexp.rl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_cap_below_one_is_refused_where_it_would_mask_everything():
    settings = {"importance_mode": "geometric_mask", "importance_cap": 0.9}
    with pytest.raises(
        ValueError, match=r"algorithm.importance_cap: expected at least 1 with 'geometric_mask'.* got 0.9"
    ):
        TrainConfig.from_dict({"algorithm": settings})
    TrainConfig.from_dict({"algorithm": settings | {"importance_cap": 1.0}})
