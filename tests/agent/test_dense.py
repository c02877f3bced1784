"""Dense search: exact neighbours, a cache per encoder, encoders that misbehave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hiexp.agent.dense import DenseTool
from hiexp.experience.encoder import HashingEncoder


class TableEncoder:
    """Unit vectors from a table of words."""

    id, spec, dim = "table-2", "", 2

    def encode(self, texts):
        angles = [sum(map(ord, text.split()[-1])) for text in texts]
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    texts = ["red", "green", "blue", "green", "yellow"]
    path.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8"
    )
    return path


def test_nearest_first_and_ties_in_corpus_order(corpus, tmp_path):
    tool = DenseTool.from_corpus(corpus, TableEncoder(), tmp_path / "cache")
    vectors = TableEncoder().encode(["red", "green", "blue", "green", "yellow"])
    for query in ("green", "blue", "purple"):
        scores = np.round(vectors.astype(np.float64) @ TableEncoder().encode([query])[0], 6)
        want = [f"d{i}" for i in np.argsort(-scores, kind="stable")]
        assert [document.id for document in tool.search([query], 5)[0]] == want
    assert [document.id for document in tool.search(["green"], 2)[0]] == ["d1", "d3"]


def test_queries_are_scored_in_bounded_blocks(corpus, tmp_path, monkeypatch):
    tool = DenseTool.from_corpus(corpus, TableEncoder(), tmp_path / "cache")
    queries = ["red", "green", "blue", "yellow"] * 3
    whole = tool.search(queries, 2)
    monkeypatch.setattr("hiexp.agent.dense_search.BLOCK_CELLS", 2048)
    assert tool.search(queries, 2) == whole
    assert tool.search([], 2) == []


def test_blocks_of_passages_change_nothing(corpus, tmp_path, monkeypatch):
    whole = DenseTool.from_corpus(corpus, HashingEncoder(64), tmp_path / "a")
    monkeypatch.setattr("hiexp.agent.dense_index._ENCODE_ROWS", 2)
    blocks = DenseTool.from_corpus(corpus, HashingEncoder(64), tmp_path / "b")
    assert blocks.search(["green", "yellow light"], 5) == whole.search(["green", "yellow light"], 5)


def test_each_encoder_has_its_own_index(corpus, tmp_path):
    DenseTool.from_corpus(corpus, HashingEncoder(64), tmp_path / "cache")
    DenseTool.from_corpus(corpus, HashingEncoder(32), tmp_path / "cache")
    DenseTool.from_corpus(corpus, HashingEncoder(64), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("wrong", [np.zeros((5, 3), np.float32), np.full((5, 2), np.nan, np.float32)])
def test_an_encoder_that_misbehaves_is_named_and_leaves_no_index(corpus, tmp_path, wrong):
    encoder = TableEncoder()
    encoder.encode = lambda texts: wrong
    with pytest.raises(ValueError, match="1 finite vectors of length 2 from 'table-2'"):
        DenseTool.from_corpus(corpus, encoder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
