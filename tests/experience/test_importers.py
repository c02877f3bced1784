"""Importers: the three log formats, grouping by question, verdicts, and an error naming file and line for bad files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hiexp.agent.record import Rollout
from hiexp.experience.guard import text_key
from hiexp.experience.importers import load_trajectories
from hiexp.io import DataError, write_jsonl
from hiexp.tasks.question import Question

QUESTION = "Who is older, Ivan Foster or Ian Paisley?"
R1_TEXT = (
    "I need both ages. <|begin_of_query|> Ivan Foster born<|end_of_query|>\n\n<|begin_of_documents|>\n"
    "(1)Title: Ivan Foster Text:  Ivan Foster (born 1943) is a minister.\n<|end_of_documents|>\n\n"
    "Now the other.</think>\n\n<answer> Ian Paisley </answer>"
)
SEARCH_R1_TEXT = (
    '<think>I need both ages.</think> <search> Ivan Foster born </search>\n<information>Doc 1(Title: "Ivan Foster") '
    "Ivan Foster (born 1943) is a minister.</information>\n<think>Now the other.</think><answer>Ian Paisley</answer>"
)


def r1_row(**changes: Any) -> dict[str, Any]:
    row = {
        "question": QUESTION, "golden_answers": ["Ian Paisley"], "prediction": "Ian Paisley", "stop_reason": "finished",
        "text": R1_TEXT,
    }  # fmt: skip
    return {**row, **changes}


def search_r1_row(**changes: Any) -> dict[str, Any]:
    return {"question": QUESTION, "ground_truth": {"target": ["Ian Paisley"]}, "response": SEARCH_R1_TEXT, **changes}


def rollout_row(**changes: Any) -> dict[str, Any]:
    rollout = Rollout(
        rollout_id="q7/3/0", question_id="q7", question=QUESTION, token_ids=[1], loss_mask=[0], logprobs=[0.0],
        spans=[], injections=[], tool_calls=[], snapshot_id=None, seed=0, policy_step=3, dialect="hiexp",
        finish_reason="answer", answer="Ian Paisley", reward=1.0, scores={"em": 1.0, "f1": 1.0, "cem": 1.0},
        steps=[("think", "ages"), ("query", "Ivan Foster born"), ("documents", "born 1943"), ("answer", "Ian Paisley")],
    )  # fmt: skip
    return {**json.loads(json.dumps(rollout.to_json())), **changes}


def load_one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Any:
    write_jsonl(tmp_path / "log.jsonl", [row])
    (group,) = load_trajectories([tmp_path / "log.jsonl"], **options)
    (trajectory,) = group
    return trajectory


@pytest.mark.parametrize("row", [r1_row(), search_r1_row()], ids=["r1_searcher", "search_r1"])
def test_logs_become_steps(tmp_path: Path, row: dict[str, Any]) -> None:
    found = load_one(tmp_path, row)
    assert [step.kind for step in found.steps] == ["think", "query", "documents", "think", "answer"]
    assert found.steps[0].text == "I need both ages."
    assert found.queries() == ("Ivan Foster born",)
    assert "born 1943" in found.steps[2].text
    assert (found.answer, found.correct, found.golden_answers) == ("Ian Paisley", True, ("Ian Paisley",))
    assert found.rollout_id.startswith("log.jsonl:1#")
    assert found.question_id == text_key(QUESTION)


def test_hiexp_rollouts_keep_ids_scores_and_step(tmp_path: Path) -> None:
    found = load_one(tmp_path, rollout_row())
    assert found.rollout_id.startswith("q7/3/0#")
    assert (found.question_id, found.policy_step, found.correct) == ("q7", 3, True)
    assert [step.kind for step in found.steps] == ["think", "query", "documents", "answer"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scores": {"em": 0.0, "f1": 0.2, "cem": 0.0}, "reward": 1.0}, False),
        ({"scores": {}, "reward": 0.0}, False),
        ({"scores": {}, "reward": 1.0}, True),
        ({"scores": {}, "reward": None, "golden_answers": ["Ivan Foster"]}, False),
        ({"scores": {"accuracy": 1.0}}, True),
        ({"scores": {"accuracy": 0.0}, "golden_answers": ["Ian Paisley"]}, False),
        ({"scores": {"em": 0.0}, "golden_answers": ["Ian Paisley"]}, True),
    ],
)
def test_hiexp_rollouts_are_judged_by_scores_golds_or_reward(
    tmp_path: Path, changes: dict[str, Any], expected: bool
) -> None:
    assert load_one(tmp_path, rollout_row(**changes)).correct is expected


@pytest.mark.parametrize(
    "question", [Question("q7", "other", ("Ian Paisley",)), Question("x", QUESTION, ("Ian Paisley",))]
)
def test_questions_bring_gold_answers(tmp_path: Path, question: Question) -> None:
    assert load_one(tmp_path, rollout_row(), questions=[question]).golden_answers == ("Ian Paisley",)


def test_search_r1_prompt_is_cut_off(tmp_path: Path) -> None:
    prompt = (
        "<|im_start|>user\nUse <search> query </search> and <answer> Beijing </answer>. Question: Who is older?\n"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    row = {"sequences_str": prompt + SEARCH_R1_TEXT, "golden_answers": "Ian Paisley"}
    found = load_one(tmp_path, row)
    assert found.question == "Who is older?"
    assert found.queries() == ("Ivan Foster born",)


def test_truncated_generation(tmp_path: Path) -> None:
    row = search_r1_row(response="<think>one</think><search>never closed", golden_answers=["x"])
    found = load_one(tmp_path, row)
    assert found.queries() == ()
    assert (found.answer, found.correct) == (None, False)


@pytest.mark.parametrize(
    ("prediction", "correct_by", "expected"),
    [
        ("Reverend Ian Paisley", "em", False),
        ("Reverend Ian Paisley", "cem", True),
        ("Paisley", "f1", True),
        ("Paisley", "cem", False),
        ("Paisley", "cem_or_f1", True),
        ("Ivan Foster", "cem_or_f1", False),
    ],
)
def test_correct_by(tmp_path: Path, prediction: str, correct_by: Any, expected: bool) -> None:
    assert load_one(tmp_path, r1_row(prediction=prediction), correct_by=correct_by).correct is expected


def test_a_verdict_in_the_log_wins(tmp_path: Path) -> None:
    assert load_one(tmp_path, r1_row(correct=False)).correct is False


def test_attempts_at_one_question_form_a_group_across_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl.gz", [r1_row(), r1_row(question="What?", golden_answers=["x"])])
    write_jsonl(tmp_path / "b.jsonl", [search_r1_row(question="who is older ivan foster or ian paisley", id="train_9")])
    groups = load_trajectories([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"])
    assert [len(group) for group in groups] == [2, 1]
    assert {one.question_id for one in groups[0]} == {"train_9"}
    assert [one.rollout_id.partition("#")[0] for one in groups[0]] == ["a.jsonl.gz:1", "b.jsonl:1"]


def test_files_of_the_same_name_give_different_rollout_ids(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "log.jsonl", [r1_row()])
    (group,) = load_trajectories([tmp_path / "one" / "log.jsonl", tmp_path / "two" / "log.jsonl"])
    assert len({one.rollout_id for one in group}) == 2


@pytest.mark.parametrize(
    ("row", "other"),
    [
        (r1_row(), r1_row(text=R1_TEXT.replace("born<", "birthday<"))),
        (r1_row(), r1_row(question="Who is younger, Ivan Foster or Ian Paisley?")),
        (search_r1_row(), search_r1_row(response=SEARCH_R1_TEXT.replace("both", "two"))),
        (rollout_row(), rollout_row(seed=1)),
        (rollout_row(), rollout_row(snapshot_id="other")),
        (rollout_row(), rollout_row(steps=[["query", "something else"]])),
    ],
)
def test_rollout_ids_tell_attempts_by_their_content(tmp_path: Path, row: dict[str, Any], other: dict[str, Any]) -> None:
    """Two files of one name, read one after the other: equal ids mean equal attempts."""
    first = load_one(tmp_path, row).rollout_id
    assert load_one(tmp_path, row).rollout_id == first
    assert load_one(tmp_path, other).rollout_id != first


def broken(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


GOOD = json.dumps(r1_row()).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "empty file"),
        ("blank.jsonl", b"\n\n", "empty file"),
        ("cut.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-40], "cut.jsonl.gz:"),
        ("latin.jsonl", GOOD + '{"question": "Gr\u00fcn"}'.encode("latin-1"), "latin.jsonl:2: not valid UTF-8"),
        ("half.jsonl", GOOD + GOOD[:30], "half.jsonl:2: not valid JSON"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: expected a JSON object"),
        ("golds.jsonl", GOOD + json.dumps(r1_row(golden_answers=[])).encode(), "golds.jsonl:2: no gold answers"),
        ("text.jsonl", GOOD + json.dumps(r1_row(text=None)).encode(), "text.jsonl:2: expected the trajectory"),
        ("question.jsonl", GOOD + json.dumps(r1_row(question=7)).encode(), "question.jsonl:2: expected the question"),
        ("format.jsonl", b'{"a": 1}\n', "format.jsonl:1: cannot tell the format"),
        ("steps.jsonl", json.dumps(rollout_row(steps=[["dance", "x"]])).encode(), "steps.jsonl:1: steps"),
        ("verdict.jsonl", json.dumps(rollout_row(scores={}, reward=None)).encode(), "verdict.jsonl:1: no verdict"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_trajectories([broken(tmp_path, name, data)])


def test_a_missing_file_stops_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_trajectories([tmp_path / "absent.jsonl"])


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log.jsonl:1: not a rollout of hiexp"):
        load_one(tmp_path, r1_row(), format="hiexp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "verl"}, "format: expected auto or one of"),
        ({"correct_by": "judge"}, "correct_by: expected one of"),
        ({"f1_threshold": 0.0}, "f1_threshold"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_one(tmp_path, r1_row(), **options)


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_jsonl(path, [r1_row()])
    with pytest.raises(ValueError, match="given twice"):
        load_trajectories([path, tmp_path / "." / "log.jsonl"])
    with pytest.raises(ValueError, match="non-empty list"):
        load_trajectories([])


@pytest.mark.data
def test_real_trajectories(data_dir: Path) -> None:
    groups = load_trajectories(sorted(data_dir.glob("trajectories_hotpotqa_*.jsonl.gz")))
    assert len(groups) == 500
    assert {len(group) for group in groups} == {2}
    both = [{one.correct for one in group} for group in groups]
    # A judge says 328 right by both, 80 by neither, 92 by one; tokens judge a little differently.
    assert abs(sum(found == {True} for found in both) - 328) < 20
    assert abs(sum(found == {True, False} for found in both) - 92) < 20
    assert sum(len(one.queries()) for group in groups for one in group) > 2000
    assert all(one.answer for group in groups for one in group)
