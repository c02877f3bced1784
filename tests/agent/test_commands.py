"""``hiexp rollout`` and ``hiexp eval`` with a tiny saved policy: results, resuming, and errors before any work."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("accelerate", reason="the train extra is not installed")

from hiexp.agent.commands import register
from hiexp.agent.record import Rollout
from hiexp.io import DataError, read_jsonl


def hiexp(*arguments):
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


@pytest.fixture
def given(tmp_path, tiny_models, fast_tokenizer, monkeypatch):
    """Flags of a model, five questions and a corpus."""
    monkeypatch.setenv("HIEXP_CACHE", str(tmp_path / "cache"))
    tiny_models["tiny"].save_pretrained(tmp_path / "model")
    fast_tokenizer.save_pretrained(tmp_path / "model")
    questions = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [f"w{i}"]} for i in range(5)]
    passages = [{"id": f"d{i}", "title": f"w{i}", "text": f"w{i} w{i + 2}"} for i in range(9)]
    for name, rows in (("q.jsonl", questions), ("c.jsonl", passages)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "--model", tmp_path / "model", "--questions", tmp_path / "q.jsonl", "--corpus", tmp_path / "c.jsonl",
        "--dialect", "hiexp_compact", "--set", "rollout.max_new_tokens=8", "--set", "rollout.max_total_tokens=60",
        "--set", "model.device=cpu",
    ]  # fmt: skip


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
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir() if path != killed}
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
    with pytest.raises(ValueError, match=r"holds rollouts with other settings \(k: 2 -> 3\)"):
        hiexp("rollout", *given, "--k", 3, "--limit", 1, "--out", tmp_path / "a")
    with pytest.raises(DataError, match=r"it holds no settings\.json"):
        hiexp("rollout", *given, "--out", tmp_path)


def test_evaluation_with_and_without_hek(given, tmp_path, capsys):
    from hiexp.experience.record import Experience
    from hiexp.experience.store import HEK

    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
        hek.add([Experience("E2", "w0 w1", "look for w3 , not w4", qa_groups=("other",))])
    assert hiexp("eval", *given, "--hek", tmp_path / "hek.sqlite", "--json", tmp_path / "e.json") == 0
    result = json.loads((tmp_path / "e.json").read_text())
    scores = result["sets"]["q"]
    assert scores["without_hek"]["n"] == scores["with_hek"]["n"] == 5
    assert scores["difference"]["f1"][0] == pytest.approx(scores["with_hek"]["f1"] - scores["without_hek"]["f1"])
    assert result["snapshot_id"]
    out = capsys.readouterr().out
    assert "without HEK" in out
    assert "searches_per_answer" in out
    hiexp("eval", *given, "--limit", 2, "--json", tmp_path / "e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    scores = result["sets"]["q"]
    assert (scores["without_hek"]["n"], scores["with_hek"], result["snapshot_id"]) == (2, None, None)


def test_several_answers_and_data_sets(given, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text((tmp_path / "q.jsonl").read_text(), encoding="utf-8")
    questions = given.index("--questions")
    arguments = [*given[:questions], *given[questions + 2 :]]
    hiexp(
        "eval", *arguments, "--questions", tmp_path / "q.jsonl", tmp_path / "other.jsonl", "--samples", 3,
        "--set", "evaluation.temperature=1", "--json", tmp_path / "e.json", "--out", tmp_path / "kept",
    )  # fmt: skip
    result = json.loads((tmp_path / "e.json").read_text())
    assert list(result["sets"]) == ["q", "other"]
    assert result["samples"] == 3
    arm = result["sets"]["q"]["without_hek"]
    assert arm["n"] == 15
    assert arm["em_pass@3"] >= arm["em"]
    low, high = arm["intervals"]["f1"]
    assert low <= arm["f1"] <= high
    kept = contents(tmp_path / "kept" / "q", "without_hek.jsonl.gz")
    assert len({row["rollout_id"] for row in kept}) == 15
    assert len({row["seed"] for row in kept}) == 15
    assert arm["f1"] == pytest.approx(sum(row["scores"]["f1"] for row in kept) / 15)
    assert "em_pass@3" in capsys.readouterr().out


def test_evaluation_of_logs(given, tmp_path):
    hiexp("rollout", *given, "--k", 2, "--out", tmp_path / "a")
    hiexp(
        "eval", "--trajectories", *(tmp_path / "a").glob("*.gz"), "--questions", tmp_path / "q.jsonl",
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    logs = json.loads((tmp_path / "e.json").read_text())
    rows = contents(tmp_path / "a")
    assert logs["n"] == len(rows)
    assert logs["f1"] == pytest.approx(sum(row["scores"]["f1"] for row in rows) / len(rows))
    assert logs["searches_per_answer"] == pytest.approx(
        sum(step[0] == "query" for row in rows for step in row["steps"]) / len(rows)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout", "--out", "x"], r"task\.train: expected questions"),
        (["eval"], r"task\.evaluation: expected questions"),
        (["rollout", "--out", "x", "--questions", "q", "--k", "0"], "--k: expected at least 1, got 0"),
        (["rollout", "--out", "x", "--questions", "q", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["eval", "--questions", "q", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["eval", "--trajectories", "t", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["eval", "--trajectories", "t", "--limit", "-1"], "--limit: expected at least 1, got -1"),
        (["rollout", "--out", "x", "--questions", "q", "--set", "rollout.top=1"], "top"),
        (["rollout", "--out", "x", "--questions", "absent.jsonl"], "absent.jsonl: no such file"),
        (["eval", "--trajectories", "absent.jsonl"], "absent.jsonl"),
        (["eval", "--trajectories", "t", "--hek", "h", "--samples", "2"], "takes no --hek, --samples"),
    ],
)
def test_errors_come_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        hiexp(*arguments)
    assert list(tmp_path.iterdir()) == []
