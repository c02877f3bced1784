"""From config to parts: the shipped config finds real questions and passages; tools of every kind answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.io import read_jsonl
from hiexp.rl.config import TaskConfig, ToolConfig, TrainConfig
from hiexp.rl.setup import check_leaks, make_task, make_tool, snapshot_metrics
from hiexp.tasks.question import Question

CONFIG = Path(__file__).parents[2] / "configs" / "hotpotqa_smollm2_cpu.yaml"


@pytest.mark.data
def test_the_shipped_config_on_real_files(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HIEXP_DATA", str(data_dir))
    config = TrainConfig.from_yaml(CONFIG, [f"tool.cache_dir={tmp_path}"])
    task = make_task(config.task, seed=0)
    questions = task.training(1, 4).questions
    assert len({question.id for question in questions}) == 4
    (evaluation,) = task.evaluation()
    assert len(evaluation.questions) == 500
    assert task.score(questions[0], questions[0].golden_answers[0])["f1"] == 1.0
    _, passage = next(read_jsonl(config.tool.corpus))
    (documents,) = make_tool(config.tool).search([f"{passage['title']} {passage['text']}"], 1)
    assert documents[0].id == str(passage["id"])


def test_maths_questions_are_judged_by_value(tmp_path):
    path = tmp_path / "maths.jsonl"
    path.write_text('{"id": "a", "problem": "1/2 + 1/4", "answer": "3/4"}\n')
    task = make_task(TaskConfig(kind="maths", train=str(path), metric="accuracy"), seed=0)
    (question,) = task.training(1, 1).questions
    assert task.score(question, "0.75")["accuracy"] == 1.0
    assert task.score(question, "0.7")["accuracy"] == 0.0


def test_questions_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "problem": "1/2 + 1/4", "answer": "3/4"}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl: columns of a maths set.*or write qa="):
        make_task(TaskConfig(train=str(path)), seed=0)
    with pytest.raises(ValueError, match="answers of aime24 are judged as maths"):
        make_task(TaskConfig(train=f"qa={path}", evaluation=f"aime24={path}"), seed=0)
    assert make_task(TaskConfig(train=f"qa={path}"), seed=0).questions[0].text == "1/2 + 1/4"


@pytest.mark.parametrize("kind", ["bm25", "dense"])
def test_tools_over_a_corpus(tiny_run, tmp_path, kind):
    config = ToolConfig(kind=kind, corpus=str(tiny_run.root / "corpus.jsonl"), cache_dir=str(tmp_path))
    (documents,) = make_tool(config).search(["grass"], 1)
    assert [document.id for document in documents] == ["dgrass"]


def test_no_tool_finds_nothing():
    assert make_tool(ToolConfig(kind="none")).search(["a", "b"], 3) == [[], []]


def test_no_snapshot_has_no_entries():
    assert snapshot_metrics(None) == {"snapshot_id": None, "hek_E1": 0, "hek_E2": 0, "hek_E3": 0}


def test_experience_that_gives_an_answer_away_is_refused(tmp_path):
    canary = Question("q1", "who wrote the harbour song", ("Ottoline Vandermeer",))
    with HEK.create(tmp_path / "hek.sqlite") as hek:
        hek.add([Experience("E1", title="songs of harbours", description="the song is by ottoline vandermeer")])
        snapshot = hek.snapshot()
    with pytest.raises(ValueError, match=r"1 entries must not be shown .* e1-.*hiexp distill \.\.\. --questions"):
        check_leaks(snapshot, [canary])
    check_leaks(snapshot, [Question("q2", "who wrote the river song", ("Somebody Else",))])
    check_leaks(None, [canary])
