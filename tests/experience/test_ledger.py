"""The ledger of a HEK: what distillation cost, batch by batch, over several runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from hiexp.experience import command_handlers
from hiexp.experience.commands import register
from hiexp.experience.ledger import Meter, Prices, Tally, add_to_ledger, read_ledger
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.io import write_jsonl

PEOPLE = ["Ada Berg", "Bela Frank", "Cato Stein", "Dora Weiss", "Egon Roth"]
LESSON = {"type": "query", "tags": ["birth"], "thinking": "the wrong one looked for where the painter lived"}


class Teacher:
    """Replies with the same lesson for every painter but one; counts what it used, and may fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.usage = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self.fail_at = fail_at

    def __call__(self, prompts: list[str]) -> list[str]:
        if self.fail_at is not None and self.usage["requests"] >= self.fail_at:
            raise ConnectionError("the teacher went away")
        self.usage["requests"] += len(prompts)
        self.usage["prompt_tokens"] += 100 * len(prompts)
        self.usage["completion_tokens"] += 10 * len(prompts)
        same = {"title": "Where was a painter born?", "description": "look for birthplace , not residence"}
        return ["no json" if "Ada" in prompt else json.dumps({**LESSON, **same}) for prompt in prompts]


def row(person: str, right: bool) -> dict[str, Any]:
    query = f"{person} birthplace" if right else f"{person} residence"
    text = (
        f"I will search. <|begin_of_query|>{query}<|end_of_query|><|begin_of_documents|>(1)Title: {person} Text: a page"
        f"<|end_of_documents|></think><answer>{'Salzburg' if right else 'Graz'}</answer>"
    )
    return {"question": f"Where did the painter {person} begin life?", "golden_answers": ["Salzburg"], "text": text}


@pytest.fixture
def log(tmp_path: Path) -> str:
    rows = [row(person, right) for person in PEOPLE for right in (True, False)]
    write_jsonl(tmp_path / "log.jsonl", rows)
    return str(tmp_path / "log.jsonl")


def hiexp(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return int(parsed.func(parsed))


def test_tokens_cost_duplicates_and_rejections_are_counted(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: Teacher())
    out = str(tmp_path / "hek.sqlite")
    hiexp("distill", log, "--out", out, "--reflector", "openai:t", "--price", "2", "10")
    with HEK.open(out) as hek:
        (name, tally), *_ = read_ledger(hek).items()
    # Ada is asked three times (two retries) and refused; the other four give one lesson and three copies of it.
    assert name == "openai:t"
    assert (tally.lessons, tally.duplicates, tally.rejected) == (1, 3, 1)
    assert (tally.requests, tally.prompt_tokens, tally.completion_tokens) == (7, 700, 70)
    assert tally.cost == pytest.approx((700 * 2 + 70 * 10) / 1e6)
    assert tally.seconds > 0
    lines = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["prompt tokens"][0] == "700"
    assert lines["equal to a lesson stored before"] == ["3"]


def test_a_build_has_its_price_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: Teacher())
    out = str(tmp_path / "hek.sqlite")
    with HEK.create(out) as hek:
        kinds = ("when was the play {} composed", "where was the painter {} born")
        hek.add(
            Experience("E1", kind.format(name), f"lesson {name} {place}", qa_groups=(f"q{place}{name}",))
            for place, kind in enumerate(kinds)
            for name in ("Bela", "Cato")
        )
    heights = ("--threshold-e2", "1.0", "--threshold-e3", "1.4")
    hiexp("build", out, "--summariser", "openai:t", *heights, "--price", "2", "10")
    with HEK.open(out) as hek:
        tally = read_ledger(hek)["summariser openai:t"]
    assert tally.requests > 0
    assert tally.cost == pytest.approx((tally.prompt_tokens * 2 + tally.completion_tokens * 10) / 1e6)
    assert f"cost {tally.cost:,.4f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--price: expected two prices >= 0"):
        hiexp("build", out, "--price", "-1", "1")


def test_a_killed_distillation_has_counted_what_it_paid_for(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hiexp.experience.reflect_llm import LLMReflector

    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: Teacher(fail_at=4))
    monkeypatch.setattr(
        command_handlers, "_reflector", lambda engine, hek: LLMReflector(engine, batch_size=2, max_retries=0)
    )
    out = str(tmp_path / "hek.sqlite")
    with pytest.raises(ConnectionError):
        hiexp("distill", log, "--out", out, "--reflector", "openai:t")
    with HEK.open(out) as hek:
        first = read_ledger(hek)["openai:t"]
    assert first.requests == 4
    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: Teacher())
    hiexp("distill", log, "--out", out, "--reflector", "openai:t")
    with HEK.open(out) as hek:
        total = read_ledger(hek)["openai:t"]
    assert (total.requests, total.lessons + total.duplicates, total.rejected) == (5, 4, 1)


def test_a_limit_is_gone_past_by_the_next_run(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "hek.sqlite")
    hiexp("distill", log, "--out", out, "--limit", "2")
    assert "left for another time                  3" in capsys.readouterr().out
    hiexp("distill", log, "--out", out)
    assert "reflected on before                    2" in capsys.readouterr().out
    with HEK.open(out) as hek:
        assert len(hek) == 5
    with pytest.raises(ValueError, match="--limit: expected at least 1"):
        hiexp("distill", log, "--out", out, "--limit", "0")


def test_ledger_of_an_old_or_a_newer_hek(tmp_path: Path) -> None:
    with HEK.create(tmp_path / "hek.sqlite") as hek:
        assert read_ledger(hek) == {}
        add_to_ledger(hek, "extractive", Tally(lessons=2))
        add_to_ledger(hek, "extractive", Tally(lessons=3, seconds=0.5))
        assert read_ledger(hek) == {"extractive": Tally(lessons=5, seconds=0.5)}
        with hek.transaction():
            hek.database.set_meta("distillations", '{"extractive": {"lessons": 1, "of_the_future": 3}}')
        assert read_ledger(hek) == {"extractive": Tally(lessons=1)}


def test_meter_reads_differences() -> None:
    teacher = Teacher()
    teacher(["Ada"])
    meter = Meter(teacher, Prices(1.0, 0.0))
    teacher(["Bela", "Cato"])
    assert meter.read().prompt_tokens == 200
    assert meter.read().prompt_tokens == 0
    assert Meter(None).read().requests == 0


@pytest.mark.parametrize("prices", [(-1.0, 0.0), (0.0, float("nan")), (float("inf"), 0.0)])
def test_prices_are_checked(prices: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="--price: expected two prices >= 0"):
        Prices(*prices)


def test_quarantine_is_listed_by_reason(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: Teacher())
    out = str(tmp_path / "hek.sqlite")
    hiexp("distill", log, "--out", out, "--reflector", "openai:t")
    with HEK.open(out, "w") as hek:
        hek.register_answers(["birthplace , not residence"])
    capsys.readouterr()
    hiexp("quarantine", out)
    shown = capsys.readouterr().out
    assert "1  entries: description: holds a gold answer of a known question" in shown
    assert "1  replies: " in shown
    assert "no json" in shown
    hiexp("quarantine", out, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(one["kind"], one["status"]) for one in rows} == {("entry", "quarantine"), ("reply", "refused")}
    with pytest.raises(ValueError, match="--examples: expected at least 0"):
        hiexp("quarantine", out, "--examples", "-1")
