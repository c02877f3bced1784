"""``hiexp rollout`` with a tiny saved policy: results, resuming, and errors before any work."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("accelerate", reason="the train extra is not installed")

from hiexp.agent.commands import register
from hiexp.agent.record import Rollout
from hiexp.io import DataError, read_jsonl
from hiexp.rl.run_directory import directory_lock


def hiexp(*arguments):
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


def contents(folder, pattern="shard_*.jsonl.gz"):
    """Rollouts without the one thing that is no function of the settings: how long a search took."""
    rows = []
    for path in sorted(folder.glob(pattern)):
        for _, row in read_jsonl(path):
            for call in row["tool_calls"]:
                call["seconds"] = 0
            rows.append(row)
    return rows


def test_rollouts_continue_after_a_kill_and_do_not_depend_on_shards(given, tmp_path, capsys):
    assert hiexp("rollout", *given, "--k", 3, "--out", tmp_path / "a", "--shard-questions", 2) == 0
    rows = contents(tmp_path / "a")
    assert [Rollout.from_json(row).rollout_id for row in rows] == [f"q{i}/0/{k}" for i in range(5) for k in range(3)]
    assert all({"em", "f1", "cem"} <= set(row["scores"]) for row in rows)
    assert "15 rollouts of 5 questions: cem" in capsys.readouterr().out
    killed = tmp_path / "a" / "shard_000002.jsonl.gz"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.*") if path != killed}
    before.pop(".lock")
    killed.unlink()
    hiexp("rollout", *given, "--k", 3, "--out", tmp_path / "a", "--shard-questions", 2)
    assert contents(tmp_path / "a") == rows
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in before} == before
    hiexp("rollout", *given, "--k", 3, "--out", tmp_path / "b", "--shard-questions", 5)
    for one, other in zip(contents(tmp_path / "b"), rows, strict=True):
        # Another batch: the same samples, log-probabilities up to rounding.
        assert one.pop("logprobs") == pytest.approx(other["logprobs"], abs=1e-5)
        assert one == {key: value for key, value in other.items() if key != "logprobs"}


def test_rollouts_of_other_settings_are_not_mixed(given, tmp_path):
    hiexp("rollout", *given, "--k", 2, "--limit", 1, "--out", tmp_path / "a")
    file = tmp_path / "a" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["rollout"]["max_searches"]  # as if it had not existed then
    file.write_text(json.dumps(settings))
    hiexp("rollout", *given, "--k", 2, "--limit", 1, "--out", tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds rollouts with other settings \(k: 2 -> 3\)"):
        hiexp("rollout", *given, "--k", 3, "--limit", 1, "--out", tmp_path / "a")
    with pytest.raises(DataError, match=r"it holds no settings\.json"):
        hiexp("rollout", *given, "--out", tmp_path)


@pytest.mark.parametrize(
    ("file", "row", "key"),
    [
        ("q.jsonl", {"id": "q0", "question": "w7 w8", "golden_answers": ["w0"]}, "questions_sha256"),
        ("q.jsonl", {"id": "q0", "question": "w0 w1", "golden_answers": ["w9"]}, "questions_sha256"),
        ("c.jsonl", {"id": "d0", "title": "w0", "text": "w7"}, "tool_identity"),
    ],
)
def test_rollouts_of_a_changed_file_are_not_mixed(given, tmp_path, file, row, key):
    hiexp("rollout", *given, "--k", 2, "--out", tmp_path / "a", "--shard-questions", 2)
    (tmp_path / "a" / "shard_000002.jsonl.gz").unlink()
    before = contents(tmp_path / "a")
    lines = (tmp_path / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=rf"holds rollouts with other settings \({key}: '.*' -> '.*'\)"):
        hiexp("rollout", *given, "--k", 2, "--out", tmp_path / "a", "--shard-questions", 2)
    assert contents(tmp_path / "a") == before


def test_two_commands_do_not_write_into_one_directory(given, tmp_path):
    with directory_lock(tmp_path / "a"), pytest.raises(ValueError, match="another process is at work"):
        hiexp("rollout", *given, "--limit", 1, "--out", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]
    hiexp("rollout", *given, "--limit", 1, "--k", 1, "--out", tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout", "--out", "x"], r"task\.train: expected questions"),
        (["rollout", "--out", "x", "--questions", "q", "--k", "0"], "--k: expected at least 1, got 0"),
        (["rollout", "--out", "x", "--questions", "q", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["rollout", "--out", "x", "--questions", "q", "--set", "rollout.top=1"], "top"),
        (["rollout", "--out", "x", "--questions", "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_errors_come_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        hiexp(*arguments)
    assert list(tmp_path.iterdir()) == []
