"""How the answers of a source are judged: label, table, columns, in that order."""

from __future__ import annotations

import json

import pytest

from hiexp.io import DataError
from hiexp.tasks.data_sets import DATA_SETS
from hiexp.tasks.judged import MEND, judged_as, judged_sources
from hiexp.tasks.qa import load_questions

MATHS = {"problem": "1 + 1", "answer": "2"}
QA = {"question": "who?", "golden_answers": ["she"]}


@pytest.fixture
def file(tmp_path):
    def write(name, row):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("label", "name", "row", "key", "kind"),
    [
        ("aime24=", "mine.jsonl", MATHS, "aime24", "maths"),
        ("AIME-2024=", "mine.jsonl", {"question": "1 + 1", "answer": "2"}, "aime24", "maths"),
        ("maths=", "mine.jsonl", QA, "mine", "maths"),
        ("qa=", "mine.jsonl", MATHS, "mine", "qa"),
        ("qa=", "aime24.jsonl", MATHS, "aime24", "qa"),
        ("", "aime24.jsonl", MATHS, "aime24", "maths"),
        ("", "hotpotqa.jsonl", QA, "hotpotqa", "qa"),
        ("", "gsm8k.jsonl", {"question": "1 + 1", "answer": "so\n#### 2"}, "gsm8k", "maths"),
        ("", "aime24.jsonl", QA, "aime24", None),
        ("", "mine.jsonl", MATHS, "mine", None),
    ],
)
def test_label_before_name_and_columns(file, label, name, row, key, kind):
    path = file(name, row)
    told = judged_as(label + path, None)
    assert (told.source, told.name, told.kind) == (path, key, kind)
    assert len(load_questions(label + path)) == 1


@pytest.mark.parametrize(
    ("row", "looks"),
    [
        (MATHS, True),
        ({"question": "1 + 1", "final_answer": ["2"]}, True),
        ({"question": "1 + 1", "answer": "so\n#### 2"}, True),
        (QA, False),
        ({"question": "which tag?", "answer": "#hope"}, False),
    ],
)
def test_columns_of_maths_sets_do_not_go_with_qa(file, row, looks):
    told = judged_as(file("mine.jsonl", row), None)
    assert bool(told.mismatch("qa")) == told.looks_like_maths == looks
    assert told.mismatch("maths") == ""


def test_a_repository_of_the_table_needs_no_label_and_no_reading():
    for key, one in DATA_SETS.items():
        told = judged_as(one.source, None)
        assert (told.name, told.kind) == (key, one.kind)
        assert bool(told.mismatch("qa")) == (one.kind == "maths")


def test_joined_sources_are_told_one_by_one(file):
    source = f"maths={file('a.jsonl', QA)}[:3] + qa={file('b.jsonl', MATHS)}"
    assert [(told.kind, count) for told, count in judged_sources(source, None)] == [("maths", 3), ("qa", None)]
    assert [one.id for one in load_questions(source)] == ["a:a-1", "b:b-1"]


def test_an_unknown_label_is_refused_and_a_file_with_an_equals_sign_is_not(file):
    with pytest.raises(DataError, match="expected qa, maths or a name"):
        judged_as("mathss=x.jsonl", None)
    assert judged_as(file("k=8.jsonl", QA), None).kind is None


@pytest.mark.data
@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k"])
def test_real_maths_files_are_known(data_dir, name):
    told = judged_as(str(data_dir / "math" / f"{name}.jsonl"), None)
    assert (told.name, told.kind) == (name, "maths")


def test_the_advice_fits_the_direction(file):
    for kind, row, words in (("qa", MATHS, "task.kind: maths"), ("maths", QA, "task.kind: qa")):
        name = "mine.jsonl" if kind == "qa" else "hotpotqa.jsonl"
        assert judged_as(file(name, row), None).mismatch(kind)
        assert words in MEND[kind]
