"""Loading questions: every schema of the table, splits, order, and one clear error for each kind of bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hiexp.io import DataError
from hiexp.tasks.qa import load_questions
from hiexp.tasks.question import Question


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


SCHEMAS = {
    "flashrag": (
        {"id": "test_0", "question": "who?", "golden_answers": ["A", "B", "A"], "metadata": {"type": "bridge"}},
        Question("test_0", "who?", ("A", "B"), {"metadata": {"type": "bridge"}}),
    ),
    "flashrag without metadata": (
        {"id": "hotpotqa_500-1", "question": " where? ", "golden_answers": ["Kauffman Stadium"]},
        Question("hotpotqa_500-1", "where?", ("Kauffman Stadium",)),
    ),
    "morehopqa": (
        {
            "_id": "x_1", "question": "How many?", "answer": "5", "previous_question": "Who?", "previous_answer": "Bob",
            "no_of_hops": 3, "reasoning_type": "Symbolic", "context": [["Bob", ["Bob is."]]],
        },
        Question("x_1", "How many?", ("5",), {"no_of_hops": 3, "reasoning_type": "Symbolic"}),
    ),
    "frames": (
        {"Unnamed: 0": 0, "Prompt": "If ...?", "Answer": "Jane", "reasoning_types": "Temporal", "wiki_links": "['u']"},
        Question("0", "If ...?", ("Jane",), {"reasoning_types": "Temporal", "wiki_links": "['u']"}),
    ),
    "aime24": (
        {"id": 60, "problem": "Aya", "solution": "s", "answer": "204", "url": "u", "question": "Aya"},
        Question("60", "Aya", ("204",), {"url": "u"}),
    ),
    "amc23": ({"id": 0, "problem": "Cities", "answer": 27.0, "question": "Cities"}, Question("0", "Cities", ("27",))),
    "gsm8k": (
        {"question": "Eggs?", "answer": "16*2 = <<16*2=32>>32\n#### 1,032", "idx": 4},
        Question("4", "Eggs?", ("1032",)),
    ),
    "plain without id": ({"question": "Is it?", "answer": True}, Question("file-1", "Is it?", ("yes",))),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema(tmp_path: Path, schema: str, ending: str) -> None:
    row, question = SCHEMAS[schema]
    assert load_questions(write(tmp_path / f"file{ending}", [row])) == [question]


def test_texts_and_gold_answers_are_kept_as_they_are(tmp_path: Path) -> None:
    row = {"question": "<|im_start|> a\x07b", "answer": "</s> c\u202ed"}
    question = load_questions(write(tmp_path / "odd.jsonl", [row]))[0]
    assert (question.text, question.golden_answers) == ("<|im_start|> a\x07b", ("</s> c\u202ed",))


def test_json_array(tmp_path: Path) -> None:
    row, question = SCHEMAS["morehopqa"]
    path = tmp_path / "with_human_verification.json"
    path.write_text(json.dumps([row], indent=1))
    assert load_questions(path) == [question]


def questions_file(path: Path, n: int) -> Path:
    return write(path, [{"id": f"q{i}", "question": f"{i}?", "golden_answers": [str(i)]} for i in range(n)])


def test_limit_and_seed(tmp_path: Path) -> None:
    path = questions_file(tmp_path / "q.jsonl", 50)
    ordered = [f"q{i}" for i in range(50)]
    assert [q.id for q in load_questions(path, limit=3)] == ordered[:3]
    shuffled = [q.id for q in load_questions(path, seed=7)]
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)
    assert [q.id for q in load_questions(path, seed=7, limit=5)] == shuffled[:5]
    assert [q.id for q in load_questions(path, seed=8)] != shuffled
    assert len(load_questions(path, limit=99)) == 50


def test_several_sources_and_the_first_of_one(tmp_path: Path) -> None:
    a, b = questions_file(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", [SCHEMAS["plain without id"][0]] * 4)
    assert [q.id for q in load_questions(f"{a} + {b}[:2]")] == ["a:q0", "a:q1", "a:q2", "b:b-1", "b:b-2"]
    assert [q.id for q in load_questions(f"{a}[:1] + {b}", limit=2)] == ["a:q0", "b:b-1"]
    assert [q.id for q in load_questions(f"{a}[:2]")] == ["q0", "q1"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: id 'a:q0' was used before, at .*a\.jsonl:1"):
        load_questions(f"{a}[:1] + {a}")


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("dataset_cache")
def test_splits_of_a_folder_fall_back_from_test_to_dev_to_train(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    questions_file(folder / "train.jsonl", 3)
    assert len(load_questions(folder)) == 3
    questions_file(folder / "test.jsonl", 2)
    assert len(load_questions(folder)) == 2
    assert len(load_questions(folder, split="train")) == 3
    with pytest.raises(DataError, match=r"sets: expected one of the splits dev; it has train, test"):
        load_questions(folder, split="dev")


@pytest.mark.usefixtures("dataset_cache")
def test_configurations_as_in_the_flashrag_repository(tmp_path: Path) -> None:
    folder = tmp_path / "FlashRAG_datasets"
    row, question = SCHEMAS["flashrag"]
    write(folder / "nq" / "test.jsonl", [row])
    questions_file(folder / "hotpotqa" / "dev.jsonl", 4)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: nq\n  data_files:\n  - split: test\n    path: nq/test.jsonl\n"
        "- config_name: hotpotqa\n  data_files:\n  - split: dev\n    path: hotpotqa/dev.jsonl\n---\n"
    )
    assert load_questions(f"{folder}:nq") == [question]
    assert len(load_questions(f"{folder}:hotpotqa")) == 4
    assert len(load_questions(f"{folder}:hotpotqa/dev.jsonl", split="dev")) == 4


@pytest.mark.usefixtures("dataset_cache")
def test_rows_of_a_folder_are_named_in_errors(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "?", "golden_answers": ["x"]}, {"id": "b", "question": "?", "golden_answers": []}]
    write(tmp_path / "sets" / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"sets\[test\], row 2: expected at least one gold answer"):
        load_questions(tmp_path / "sets")


@pytest.mark.usefixtures("dataset_cache")
def test_an_unknown_hub_name_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="nobody/nothing: neither a local file or folder nor a data set"):
        load_questions("nobody/nothing")


GOOD = {"id": "1", "question": "who?", "golden_answers": ["A"]}
BAD_ROWS = {
    "no gold answers": ({"id": "2", "question": "?", "golden_answers": []}, "expected at least one gold answer"),
    "blank gold answers": ({"id": "2", "question": "?", "golden_answers": [" ", None]}, "at least one gold answer"),
    "null answer": ({"id": "2", "question": "?", "golden_answers": None}, "at least one gold answer"),
    "answer of a wrong type": (
        {"id": "2", "question": "?", "golden_answers": [{}]},
        "expected text or a number .* dict",
    ),
    "no question": ({"id": "2", "golden_answers": ["A"]}, "expected text in column 'question', got None"),
    "blank question": ({"id": "2", "question": " ", "golden_answers": ["A"]}, "expected text in column 'question'"),
    "used id": ({**GOOD, "question": "other?"}, r"id '1' was used before, at .*q\.jsonl:1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_name_file_and_line(tmp_path: Path, case: str) -> None:
    row, message = BAD_ROWS[case]
    path = write(tmp_path / "q.jsonl", [GOOD, row])
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{message}"):
        load_questions(path)


def test_gsm8k_row_without_answer_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "?", "answer": "ends in #### "}])
    with pytest.raises(DataError, match=r"q\.jsonl:1: column 'answer': expected a solution that ends in '#### answer'"):
        load_questions(path)


def test_unknown_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"query": "?", "label": "A"}])
    with pytest.raises(
        DataError, match=r"q\.jsonl:1: unknown columns \['label', 'query'\]; expected one of .*flashrag"
    ):
        load_questions(path)


BAD_FILES = {
    "missing": (None, r"q\.jsonl: no such file"),
    "empty": (b"", r"q\.jsonl: empty file"),
    "malformed": (json.dumps(GOOD).encode() + b"\n{oops\n", r"q\.jsonl:2: not valid JSON"),
    "wrong encoding": ('{"question": "Jędrzejewiczowa"}\n'.encode("utf-16"), r"q\.jsonl:1: not valid UTF-8"),
    "truncated": (json.dumps(GOOD).encode()[:-5], r"q\.jsonl:1: not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / "q.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_questions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"q\.json:1: not valid JSON"),
        ("{}", "expected a non-empty JSON array"),
        ("[1]", r"row 1: expected a JSON object"),
    ],
)
def test_bad_json_array(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_questions(tmp_path / "q.json")


def test_bad_arguments(tmp_path: Path) -> None:
    path = questions_file(tmp_path / "q.jsonl", 2)
    with pytest.raises(ValueError, match="limit: expected at least 1 or None, got 0"):
        load_questions(path, limit=0)
    with pytest.raises(ValueError, match=r"split: .*q\.jsonl is one file and has no splits, got split='dev'"):
        load_questions(path, split="dev")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n", "first_id", "first_answer"),
    [
        ("train_hotpot_2wiki.jsonl", 8148, "stage_2-1", "filmmaker"),
        ("hotpotqa_500.jsonl", 500, "hotpotqa_500-1", "Kauffman Stadium"),
        ("2wiki_500.jsonl", 500, "2wiki_500-1", "Tetisheri"),
        ("math/aime24.jsonl", 30, "60", "204"),
        ("math/amc23.jsonl", 40, "0", "27"),
        ("math/gsm8k.jsonl", 1319, "0", "18"),
    ],
)
def test_real_files(data_dir: Path, name: str, n: int, first_id: str, first_answer: str) -> None:
    questions = load_questions(data_dir / name)
    assert len(questions) == n
    assert questions[0].id == first_id
    assert questions[0].golden_answers == (first_answer,)
    assert all(question.golden_answers for question in questions)
