"""BM25 search against the formula, with ties, accents and queries without a known word."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("bm25s")

from hiexp.agent.bm25 import Bm25Tool, best_rows, tokenize
from hiexp.io import DataError

TEXTS = [
    "the cat sat on the mat", "a dog sat", "cats and dogs and cats", "mat mat mat", "Café au lait", "the the the",
    "dog on a mat with a dog", "a dog sat",
]  # fmt: skip
QUERY_WORDS = ["the", "cat", "dog", "mat", "sat", "cafe", "on", "a", "lait"]


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bm25")
    rows = [{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Bm25Tool.from_corpus(folder / "c.jsonl", folder / "cache")


def formula(query, k1=0.9, b=0.4):
    """Lucene's BM25 (Robertson and Zaragoza 2009, with its idf), in plain Python."""
    documents = [Counter(tokenize(text)) for text in TEXTS]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for counts in documents:
        score = 0.0
        for word in tokenize(query):
            df = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + k1 * (1 - b + b * counts.total() / mean))
        scores.append(score)
    return scores


@given(st.lists(st.sampled_from(QUERY_WORDS), min_size=1, max_size=4), st.integers(1, 9))
def test_order_is_that_of_the_formula(tool, words, top_k):
    query = " ".join(words)
    scores = formula(query)
    got = [int(document.id[1:]) for document in tool.search([query], top_k)[0]]
    # float32 scores inside; equal documents tie exactly and the earlier one wins.
    want = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: (-round(scores[i], 5), i))[:top_k]
    assert [round(scores[i], 5) for i in got] == [round(scores[i], 5) for i in want]
    assert got.index(1) < got.index(7) if {1, 7} <= set(got) else 7 not in got or 1 in got


def test_accents_and_case_do_not_matter(tool):
    assert [document.text for document in tool.search(["CAFE Lait!"], 3)[0]] == ["Café au lait"]


def test_a_query_without_known_words_finds_nothing(tool):
    assert tool.search(["zzz qqq", "", "?!"], 3) == [[], [], []]


def test_the_second_opening_reads_the_cache(tool, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("hiexp.agent.bm25._build", None)
    folder = next(tmp_path_factory.getbasetemp().glob("bm25*"))
    again = Bm25Tool.from_corpus(folder / "c.jsonl", folder / "cache")
    assert again.search(["dog mat"], 4) == tool.search(["dog mat"], 4)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 14))
def test_best_rows_is_a_stable_sort(scores, top_k):
    want = [row for row in sorted(range(len(scores)), key=lambda row: (-scores[row], row)) if scores[row] > 0][:top_k]
    assert best_rows(np.array(scores, np.float32), top_k) == want


@pytest.mark.data
def test_real_corpus_answers_a_real_question(data_dir, tmp_path):
    tool = Bm25Tool.from_corpus(data_dir / "corpus_hotpotqa.jsonl.gz", tmp_path)
    found = tool.search(["What party campaigned for the Irish Home Rule Movement?"], 3)[0]
    assert "Home Rule League" in [document.title for document in found]


def test_a_corpus_without_words_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "... !"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: expected passages with words, got none in the 1 titles and texts"):
        Bm25Tool.from_corpus(tmp_path / "c.jsonl", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
