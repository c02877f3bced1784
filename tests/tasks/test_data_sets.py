"""Named data sets: each name asks the hub for the right thing and reads rows of that schema; unknown names get help."""

from __future__ import annotations

import json
import re

import pytest

from hiexp.io import DataError
from hiexp.tasks.data_sets import DATA_SETS, data_set_table, find_data_set
from hiexp.tasks.qa import COLUMNS, load_questions, repeated_texts
from hiexp.tasks.question import Question

FLASHRAG = {"id": "test_0", "question": "who?", "golden_answers": ["A", "B"], "metadata": {"type": "bridge"}}
# One row of each repository's schema, the split it lies in, and the question it must become.
ROWS = {
    **{
        name: (FLASHRAG, split, ("test_0", "who?", ("A", "B")))
        for name, split in (
            ("hotpotqa", "dev"), ("2wiki", "dev"), ("musique", "dev"), ("bamboogle", "test"), ("nq", "test"),
            ("triviaqa", "test"), ("popqa", "test"),
        )
    },
    "morehopqa": (
        {"_id": "m", "question": "How many?", "answer": "5", "previous_question": "Who?", "no_of_hops": 3},
        "train", ("m", "How many?", ("5",)),
    ),
    "frames": (
        {"Unnamed: 0": 7, "Prompt": "If?", "Answer": "Jane", "reasoning_types": "Temporal", "wiki_links": "['u']"},
        "test", ("7", "If?", ("Jane",)),
    ),
    "aime24": ({"id": 60, "problem": "Aya", "solution": "s", "answer": "204"}, "train", ("60", "Aya", ("204",))),
    "aime25": ({"problem": "Sum", "answer": "70", "id": "0"}, "test", ("0", "Sum", ("70",))),
    "amc23": ({"id": 0, "question": "Cities", "answer": "27.0", "url": "u"}, "test", ("0", "Cities", ("27.0",))),
    "math500": (
        {"problem": "P", "solution": "s", "answer": "\\frac{1}{2}", "level": 2, "unique_id": "t/1.json"},
        "test", ("t/1.json", "P", ("\\frac{1}{2}",)),
    ),
    "minerva": ({"question": "Star", "answer": "1.6"}, "test", ("minerva-1", "Star", ("1.6",))),
    "olympiadbench": (
        {"id": 2231, "question": "Find n.", "final_answer": ["2"], "context": "Let n > 0.", "subfield": "Algebra"},
        "train", ("2231", "Let n > 0.\nFind n.", ("2",)),
    ),
    "gsm8k": ({"question": "Eggs?", "answer": "9 * 2\n#### 1,018"}, "test", ("gsm8k-1", "Eggs?", ("1018",))),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """``load_dataset`` of the real package over local files; what it was asked for is kept."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    real, asked = datasets.load_dataset, []

    def put(row, split):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")

        def load(name, part=None, **keywords):
            asked.append((name, part, keywords.get("data_files")))
            loaded = real("json", data_files={split: str(tmp_path / f"{split}.jsonl")})
            return loaded[split] if "split" in keywords else loaded

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return put


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_name_reads_its_schema(hub, name):
    row, split, expected = ROWS[name]
    asked = hub(row, split)
    (question,) = load_questions(name)
    assert (question.id, question.text, question.golden_answers) == expected
    entry = DATA_SETS[name]
    source, part, file = asked[0]
    wanted = (
        (entry.hub, entry.part or None, None)
        if not entry.part.endswith(".json")
        else ("json", None, f"hf://datasets/{entry.hub}/{entry.part}")
    )
    assert (source, part, file) == wanted
    assert {COLUMNS[entry.columns].question, COLUMNS[entry.columns].answers} <= row.keys()


def test_a_context_stands_before_the_question_only_where_there_is_one(hub):
    row, split, _ = ROWS["olympiadbench"]
    hub({**row, "context": None}, split)
    assert load_questions("OlympiadBench")[0].text == "Find n."


@pytest.mark.parametrize(
    ("written", "key"), [("HotpotQA", "hotpotqa"), ("2WikiMultihopQA", "2wiki"), ("MATH-500", "math500")]
)
def test_spelling_does_not_matter(written, key):
    assert find_data_set(written)[0] == key


def test_a_local_file_or_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hotpotqa").write_text(json.dumps({"question": "mine?", "answer": "yes"}) + "\n")
    assert load_questions("hotpotqa")[0].text == "mine?"


@pytest.mark.parametrize(
    ("name", "near"), [("hotpotq", "hotpotqa"), ("musiq", "musique"), ("aime2026", "aime24|aime25")]
)
def test_an_unknown_name_gets_the_nearest_ones(name, near):
    with pytest.raises(DataError, match=rf"{name}: neither a file or folder nor a known .*did you mean .*({near})"):
        load_questions(name)


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(DataError, match=r"^xxxxxxxx: (?!.*did you mean).*--list-sets"):
        load_questions("xxxxxxxx")


def test_the_table_lists_every_set_with_its_source():
    lines = data_set_table().splitlines()
    assert len(lines) == len(DATA_SETS) + 1
    for key, entry in DATA_SETS.items():
        assert any(re.match(rf"{key} .*{re.escape(entry.source)} .*{entry.metric}", line) for line in lines)


def test_repeated_texts_are_found_whatever_their_ids_case_and_spacing():
    texts = ["Who wrote it?", "who  wrote it?", "Where?", "WHERE?", "When?"]
    questions = [Question(str(i), text, ("x",)) for i, text in enumerate(texts)]
    assert repeated_texts(questions) == [("0", "1"), ("2", "3")]
    assert repeated_texts(questions[::2]) == []
