"""The commands distill, build, query and explain, run as a user runs them."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from hiexp.experience import command_handlers
from hiexp.experience.commands import register
from hiexp.experience.ledger import read_ledger
from hiexp.experience.store import HEK
from hiexp.io import DataError, write_jsonl

PEOPLE = ["Ada Berg", "Bela Frank", "Cato Stein", "Dora Weiss", "Egon Roth", "Flora Lang"]


def row(person: str, right: bool) -> dict[str, Any]:
    query = f"{person} birthplace" if right else f"{person} residence"
    text = (
        f"I have to look this up because I do not know much about this person, so I will search for the place first. "
        f"<|begin_of_query|>{query}<|end_of_query|><|begin_of_documents|>(1)Title: {person} Text: a page"
        f"<|end_of_documents|></think><answer>{'Salzburg' if right else 'Graz'}</answer>"
    )
    question = f"In which town did the painter {person} begin life?"
    return {"question": question, "golden_answers": ["Salzburg"], "text": text}


@pytest.fixture
def logs(tmp_path: Path) -> list[str]:
    write_jsonl(tmp_path / "right.jsonl.gz", [row(person, True) for person in PEOPLE])
    write_jsonl(tmp_path / "wrong.jsonl", [row(person, False) for person in PEOPLE[:-1]])
    return [str(tmp_path / "right.jsonl.gz"), str(tmp_path / "wrong.jsonl")]


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    parsed = parser.parse_args(arguments)
    return int(parsed.func(parsed))


@pytest.fixture
def hek(tmp_path: Path, logs: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "hek.sqlite")
    assert run("distill", *logs, "--out", path) == 0
    capsys.readouterr()
    return path


def test_distill_makes_a_hek(tmp_path: Path, logs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "hek.sqlite")
    assert run("distill", *logs, "--out", path) == 0
    table = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["attempts"] == ["11"]
    assert table["right and wrong attempts"] == ["5"]
    assert table["all right"] == ["1"]
    assert table["lessons added to the HEK"] == ["5"]
    with HEK.open(path) as stored:
        lessons = list(stored)
    assert {lesson.description.partition(" ; ")[0] for lesson in lessons} == {"look for birthplace , not residence"}
    assert all("salzburg" not in lesson.description.lower() for lesson in lessons)


def test_distill_again_adds_nothing(logs: list[str], hek: str, capsys: pytest.CaptureFixture[str]) -> None:
    with HEK.open(hek) as stored:
        before = stored.snapshot().id
    assert run("distill", *logs, "--out", hek) == 0
    out = capsys.readouterr().out
    assert "reflected on before                    5" in out
    with HEK.open(hek) as stored:
        assert stored.snapshot().id == before


def test_distill_of_another_file_of_the_same_name_adds_its_lessons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "hek.sqlite")

    def distilled(folder: str) -> list[str]:
        assert run("distill", str(tmp_path / folder / "log.jsonl"), "--out", path) == 0
        table = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
        return [*table["reflected on before"], *table["lessons added to the HEK"]]

    for folder, people in (("a", PEOPLE[:3]), ("b", PEOPLE[3:])):
        (tmp_path / folder).mkdir()
        write_jsonl(
            tmp_path / folder / "log.jsonl", [row(person, right) for person in people for right in (True, False)]
        )
    assert distilled("a") == ["0", "3"]
    assert distilled("b") == ["0", "3"]
    assert distilled("a") == distilled("b") == ["3", "0"]


def test_distill_continues_after_an_interruption(
    tmp_path: Path, logs: list[str], hek: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "cut.sqlite")
    add, calls = HEK.add, []

    def interrupted(self: HEK, lessons: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, lessons)

    monkeypatch.setattr(HEK, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("distill", *logs, "--out", path)
    with HEK.open(path) as stored:
        assert len(stored) == 2
    assert run("distill", *logs, "--out", path) == 0
    with HEK.open(path) as stored, HEK.open(hek) as whole:
        assert {entry.content_hash() for entry in stored} == {entry.content_hash() for entry in whole}


def test_distill_takes_gold_answers_from_question_files(tmp_path: Path, logs: list[str]) -> None:
    """An answer of a question that is in no log must not stand in a lesson either."""
    questions = tmp_path / "train.jsonl"
    write_jsonl(questions, [{"id": "t1", "question": "What did she paint?", "golden_answers": ["residence"]}])
    path = str(tmp_path / "hek.sqlite")
    assert run("distill", *logs, "--out", path, "--questions", str(questions)) == 0
    with HEK.open(path) as stored:
        assert len(stored) == 0
        assert {item["reason"] for item in stored.quarantined()} == {
            "description: holds a gold answer of a known question"
        }


def test_replies_that_cannot_be_used_are_stored(
    tmp_path: Path, logs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "hek.sqlite")
    prompts: list[str] = []

    def complete(batch: list[str]) -> list[str]:
        prompts.extend(batch)
        return ["no idea"] * len(batch)

    monkeypatch.setattr(command_handlers, "_model", lambda argument, spec: complete)
    assert run("distill", *logs, "--out", path, "--reflector", "llm:somewhere") == 0
    assert "replies that could not be used         5" in capsys.readouterr().out
    with HEK.open(path) as stored:
        kept = stored.quarantined()
    assert [item["kind"] for item in kept] == ["reply"] * 5
    assert json.loads(kept[0]["body"])["raw"] == "no idea"
    asked = len(prompts)
    assert run("distill", *logs, "--out", path, "--reflector", "llm:somewhere") == 0
    assert len(prompts) == asked  # a rejected reply is not asked for again


LESSON = {
    "type": "query", "title": "where a painter was born", "tags": [], "thinking": "",
    "description": "search for the birthplace , not for the residence",
}  # fmt: skip


def teacher(http_server: Any, monkeypatch: pytest.MonkeyPatch, answer: Any) -> Any:
    """A chat server that knows a lesson; ``answer`` says what prompts about Cato Stein get, from their request."""

    def reply(request: Any) -> Any:
        if "Cato Stein" in request.json()["messages"][0]["content"]:
            return answer(request)
        choices = [{"message": {"content": json.dumps(LESSON)}}]
        return 200, {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 3}}

    server = http_server(reply)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    return server


@pytest.mark.parametrize("status", [200, 400])
def test_a_teacher_that_declines_a_question_blocks_nothing(
    tmp_path: Path, logs: list[str], http_server: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Nothing, or an error of this item alone: asked three times in all, then kept as a reply without use."""
    usage = {"prompt_tokens": 10, "completion_tokens": 0}
    declined = {"choices": [{"message": {"content": None}}], "usage": usage} if status == 200 else {"error": "policy"}
    server = teacher(http_server, monkeypatch, lambda request: (status, declined))
    path = str(tmp_path / "hek.sqlite")
    for _ in range(2):
        assert run("distill", *logs, "--out", path, "--reflector", "openai:big") == 0
        with HEK.open(path) as stored:
            (lesson,), (kept,) = list(stored), stored.quarantined()
            tally = read_ledger(stored)["openai:big"]
        assert len(lesson.qa_groups) == 4  # equal lessons are one entry
        assert kept["kind"] == "reply"
        others = sum(b"Cato Stein" not in request.body for request in server.requests)
        assert len(server.requests) == others + 3
        paid = others + (3 if status == 200 else 0)
        assert (tally.requests, tally.prompt_tokens, tally.completion_tokens) == (paid, 10 * paid, 3 * others)


def test_what_a_failed_batch_cost_is_counted(
    tmp_path: Path, logs: list[str], http_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = threading.Semaphore(0)

    def denied(request: Any) -> Any:
        for _ in range(4):
            assert others.acquire(timeout=60)
        return 401, {"error": "no credit left"}

    server = teacher(http_server, monkeypatch, denied)
    (known,) = server.replies
    server.replies = (
        lambda request: (others.release() if b"Cato Stein" not in request.body else None, known(request))[1],
    )
    path = str(tmp_path / "hek.sqlite")
    with pytest.raises(OSError, match="no credit left"):
        run("distill", *logs, "--out", path, "--reflector", "openai:big")
    with HEK.open(path) as stored:
        assert read_ledger(stored)["openai:big"].prompt_tokens == 40


def test_build_query_explain(hek: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", hek) == 0
    assert "E2" in capsys.readouterr().out
    question = "In which town did the painter Nora Vogel begin life?"
    assert run("query", hek, question, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"E1", "E2"} <= {one["level"] for one in rows}
    assert all("look for birthplace , not residence" in one["description"] for one in rows)
    pattern = next(one for one in rows if one["level"] == "E2")
    assert run("explain", hek, pattern["exp_id"]) == 0
    explained = capsys.readouterr().out
    assert f"{pattern['exp_id']} revision" in explained
    assert explained.count("children     E1 e1-") >= 2
    lesson = next(one for one in rows if one["level"] == "E1")
    assert run("explain", hek, lesson["exp_id"][:9]) == 0
    explained = capsys.readouterr().out
    assert "right.jsonl.gz:" in explained
    assert f"parents      E2 {pattern['exp_id']}" in explained
    assert "revision     2: active" in explained


def test_explain_shows_links_to_entries_that_are_not_stored(hek: str, capsys: pytest.CaptureFixture[str]) -> None:
    with HEK.open(hek, "w") as stored:
        entry = stored.revise(next(iter(stored)).exp_id, parents=("e2-gone",))
    assert run("explain", hek, entry.exp_id) == 0
    assert "parents      e2-gone  (missing)" in capsys.readouterr().out


def test_build_again_changes_nothing(hek: str) -> None:
    assert run("build", hek) == 0
    with HEK.open(hek) as stored:
        before = stored.snapshot().id
    assert run("build", hek) == 0
    with HEK.open(hek) as stored:
        assert stored.snapshot().id == before


def test_query_levels_and_thresholds(hek: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("query", hek, "something else entirely", "--level", "E1", "--threshold", "0.99") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--threshold -1" in captured.err
    assert run("query", hek, "something else entirely", "--level", "E1", "--threshold", "-1", "--top-k", "2") == 0
    assert capsys.readouterr().out.count(" E1 ") == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["distill", "absent.jsonl", "--out", "new.sqlite"], DataError, "absent.jsonl: no such file"),
        (["query", "absent.sqlite", "text"], DataError, "absent.sqlite: no such HEK"),
        (["build", "absent.sqlite"], DataError, "absent.sqlite: no such HEK"),
        (["query", "HEK", "  "], ValueError, "text: expected a question"),
        (["explain", "HEK", "zzz"], ValueError, "no entry whose id starts with 'zzz'"),
        (["explain", "HEK", "e1-"], ValueError, "5 entries start with 'e1-'"),
        (["build", "HEK", "--threshold-e2", "-1"], ValueError, "thresholds"),
        (
            ["build", "HEK", "--summariser", "gpt"],
            ValueError,
            "--summariser: expected extractive, llm:MODEL or openai:MODEL",
        ),
    ],
)
def test_errors_say_what_is_wrong(
    hek: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(*[hek if argument == "HEK" else argument for argument in arguments])
    assert not Path("new.sqlite").exists()


@pytest.mark.parametrize("reflector", ["gpt", "llm:"])
def test_an_unknown_reflector_makes_no_file(tmp_path: Path, logs: list[str], reflector: str) -> None:
    with pytest.raises(ValueError, match="--reflector: expected extractive, llm:MODEL or openai:MODEL"):
        run("distill", *logs, "--out", str(tmp_path / "new.sqlite"), "--reflector", reflector)
    assert not (tmp_path / "new.sqlite").exists()


def test_another_encoder_is_refused(logs: list[str], hek: str) -> None:
    with pytest.raises(ValueError, match="encoder"):
        run("distill", *logs, "--out", hek, "--encoder", "hashing:64")


def test_a_second_writer_is_refused(logs: list[str], hek: str) -> None:
    with HEK.open(hek, "w"), pytest.raises(ValueError, match="already open for writing"):
        run("distill", *logs, "--out", hek)


@pytest.mark.parametrize("command", ["distill", "build", "query", "explain"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(command, "--help")
    assert left.value.code == 0
    assert f"hiexp {command} " in capsys.readouterr().out


@pytest.mark.data
def test_real_input(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second main job: real logs in, a HEK with three levels out, and an answer to a question."""
    path = str(tmp_path / "hek.sqlite")
    assert run("distill", *map(str, sorted(data_dir.glob("trajectories_hotpotqa_*.jsonl.gz"))), "--out", path) == 0
    assert run("build", path, "--embed", "title+description") == 0
    assert run("build", path) == 0
    with HEK.open(path) as stored:
        sizes = [len(stored.entries(level)) for level in ("E1", "E2", "E3")]
    assert sizes[0] > 70
    assert sizes[0] > sizes[1] > sizes[2] > 0
    capsys.readouterr()
    assert run("query", path, "Who is older, Tom Hanks or Brad Pitt?") == 0
    assert "search each compared thing on its own" in capsys.readouterr().out
