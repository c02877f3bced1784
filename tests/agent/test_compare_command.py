"""``hiexp compare`` with a tiny saved policy, run as a user runs it."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("accelerate", reason="the train extra is not installed")

from hiexp.agent.commands import register
from hiexp.experience.ledger import Tally, add_to_ledger
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.io import read_jsonl


def hiexp(*arguments):
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


@pytest.fixture
def heks(tmp_path):
    paths = []
    for name, text in (("own", "look for w3 , not w4"), ("taught", "look for w5 , not w6")):
        paths.append(tmp_path / f"{name}.sqlite")
        with HEK.create(paths[-1], encoder="hashing") as hek:
            hek.add([Experience(level, "w0 w1", text, qa_groups=("other",)) for level in ("E1", "E2")])
    return paths


@pytest.fixture
def model(tmp_path, tiny_models, fast_tokenizer, monkeypatch):
    monkeypatch.setenv("HIEXP_CACHE", str(tmp_path / "cache"))
    tiny_models["tiny"].save_pretrained(tmp_path / "model")
    fast_tokenizer.save_pretrained(tmp_path / "model")
    passages = [{"id": f"d{i}", "title": f"w{i}", "text": f"w{i} w{i + 2}"} for i in range(9)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    return [
        "--model", tmp_path / "model", "--corpus", tmp_path / "c.jsonl", "--dialect", "hiexp_compact",
        "--set", "rollout.max_new_tokens=8", "--set", "rollout.max_total_tokens=60", "--set", "model.device=cpu",
        "--set", "evaluation.temperature=1",
    ]  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    rows = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [f"w{i}"]} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["--questions", tmp_path / "q.jsonl"]


def test_contents_need_no_model(heks, questions, tmp_path, capsys):
    assert hiexp("compare", *heks, *questions, "--json", tmp_path / "c.json") == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert list(result["heks"]) == [str(path) for path in heks]
    assert result["overlap"][0]["common_questions"] == 1
    assert result["serving"][str(heks[0])]["questions"] == 4
    assert "scores" not in result
    assert "1 / 1 / 0" in capsys.readouterr().out


def test_a_cost_without_known_prices_is_a_dash(heks, capsys):
    """Nothing counted, no model asked, a priced one, and one of two without prices."""

    def cost_row(**tallies):
        with HEK.open(heks[1], "w") as hek:
            for name, tally in tallies.items():
                add_to_ledger(hek, name, tally)
        assert hiexp("compare", *heks) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cost ")]
        return row.split()[1:]

    assert cost_row() == ["-", "-"]
    assert cost_row(extractive=Tally(lessons=3, seconds=1.0)) == ["-", "-"]
    assert cost_row(priced=Tally(requests=2, prompt_tokens=100, cost=0.0021)) == ["-", "0.0021"]
    assert cost_row(unpriced=Tally(requests=2, prompt_tokens=100)) == ["-", "-"]


def test_answers_with_each_hek_are_kept_and_read_again(heks, model, questions, tmp_path, capsys, monkeypatch):
    command = ["compare", *heks, *model, *questions, "--samples", 2, "--out", tmp_path / "kept", "--json"]
    hiexp(*command, tmp_path / "first.json")
    first = json.loads((tmp_path / "first.json").read_text())["scores"]
    assert list(first) == ["no HEK", *(str(path) for path in heks)]
    assert first["no HEK"]["difference"] is None
    assert all(arm["n"] == 8 for arm in first.values())
    # The difference is one of question means, so it is the difference of the means.
    taught = first[str(heks[1])]
    assert taught["difference"]["f1"][0] == pytest.approx(taught["f1"] - first["no HEK"]["f1"])
    arms = ("without_hek", "with_hek", "with_hek")
    files = [tmp_path / "kept" / f"arm_{i}" / "q" / f"{arm}.jsonl" for i, arm in enumerate(arms)]
    shown = [[bool(row["injections"]) for _, row in read_jsonl(file)] for file in files]
    assert not any(shown[0])
    assert all(shown[1])
    assert all(shown[2])
    assert "minus no HEK" in capsys.readouterr().out
    monkeypatch.setattr("hiexp.agent.arms.ArmActor.run", lambda *args, **keywords: pytest.fail("answered again"))
    hiexp(*command, tmp_path / "second.json")
    assert json.loads((tmp_path / "second.json").read_text())["scores"] == first
    with pytest.raises(ValueError, match="holds rollouts with other settings"):
        hiexp("compare", heks[0], *model, *questions, "--samples", 2, "--out", tmp_path / "kept")


def test_errors_come_before_any_work(heks, tmp_path):
    with pytest.raises(ValueError, match="expected different files"):
        hiexp("compare", heks[0], heks[0])
    with pytest.raises(ValueError, match="--out: keeps rollouts, and takes a model"):
        hiexp("compare", *heks, "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="no such HEK"):
        hiexp("compare", tmp_path / "absent.sqlite")
    with pytest.raises(ValueError, match=r"task\.evaluation: expected questions"):
        hiexp("compare", *heks, "--model", "m")
    with pytest.raises(ValueError, match="--samples: expected at least 1"):
        hiexp("compare", *heks, "--samples", 0)
    assert not (tmp_path / "x").exists()
