"""Indexes on disk: exact in bounded memory, continued after a kill, refused when they are of something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.dense import DenseTool, build_dense_index, e5_prefixes, memory_estimate
from hiexp.agent.dense_index import ShardedVectors
from hiexp.agent.dense_search import ExactSearcher
from hiexp.agent.index_folder import is_whole
from hiexp.agent.search_tools import open_index
from hiexp.experience.encoder import HashingEncoder
from hiexp.io import DataError


class CountingEncoder(HashingEncoder):
    """Counts texts, and is killed at the text ``fatal``."""

    def __init__(self, dim=32, fatal=None):
        super().__init__(dim)
        self.fatal, self.texts = fatal, []

    def encode(self, texts):
        if self.fatal is not None and any(self.fatal in text for text in texts):
            raise KeyboardInterrupt
        self.texts += texts
        return super().encode(texts)


def write_corpus(path, n, word="passage"):
    rows = (
        {"id": f"d{i}", "title": f"T{i}", "text": f"{word} number {i} of {n}, about {i * 7 % 11}"} for i in range(n)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "c.jsonl", 50)


def unit_rows(seed, n, d):
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 60),
    shard=st.integers(1, 25),
    cells=st.integers(8, 200),
    top_k=st.integers(1, 12),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 5),
)
def test_shards_and_blocks_give_what_one_product_gives(tmp_path_factory, n, shard, cells, top_k, dtype, seed):
    folder = tmp_path_factory.mktemp("v")
    vectors = unit_rows(seed, n, 8).astype(dtype)
    vectors[n // 2] = vectors[0]  # a tie
    for number, start in enumerate(range(0, n, shard)):
        np.save(folder / f"vectors_{number:05d}.npy", vectors[start : start + shard])
    queries = unit_rows(seed + 100, 3, 8)
    sharded = ShardedVectors(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiexp.agent.dense_search.BLOCK_CELLS", cells + 1024)
        found = ExactSearcher(sharded).search(queries, top_k)
    for query, ranked in zip(queries, found, strict=True):
        scores = np.round((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1), 6)
        want = np.argsort(-scores, kind="stable")[:top_k]
        assert [row for row, _ in ranked] == want.tolist()
        assert [score for _, score in ranked] == scores[want].tolist()


def test_a_killed_build_goes_on_behind_the_last_whole_shard(corpus, tmp_path):
    killed = CountingEncoder(fatal="number 25 ")
    with pytest.raises(KeyboardInterrupt):
        build_dense_index(corpus, killed, tmp_path / "index", shard_rows=10)
    assert not (tmp_path / "index").exists()
    again = CountingEncoder()
    folder = build_dense_index(corpus, again, tmp_path / "index", shard_rows=10)
    passages = [text for text in again.texts if "number" in text]
    assert [text.split()[3] for text in passages] == [str(i) for i in range(20, 50)]
    whole = build_dense_index(corpus, CountingEncoder(), tmp_path / "other", shard_rows=10)
    for file in whole.glob("vectors_*"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    third = CountingEncoder()
    build_dense_index(corpus, third, tmp_path / "index", shard_rows=10)
    assert third.texts == []


def test_an_unfinished_index_of_another_corpus_is_not_continued(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_dense_index(corpus, CountingEncoder(fatal="number 25 "), tmp_path / "index", shard_rows=10)
    other = write_corpus(tmp_path / "other.jsonl", 50, "page")
    with pytest.raises(ValueError, match=r"another corpus, c\.jsonl .* wanted other\.jsonl"):
        build_dense_index(other, CountingEncoder(), tmp_path / "index", shard_rows=10)
    with pytest.raises(ValueError, match="shard_rows 10; wanted shard_rows 20"):
        build_dense_index(corpus, CountingEncoder(), tmp_path / "index", shard_rows=20)


def test_an_index_of_another_corpus_encoder_or_kind_is_refused(corpus, tmp_path):
    folder = build_dense_index(corpus, HashingEncoder(32), tmp_path / "index")
    with pytest.raises(ValueError, match="encoder 'hashing-v1-d32'; wanted encoder 'hashing-v1-d64'"):
        DenseTool(folder, HashingEncoder(64))
    with pytest.raises(ValueError, match="encoder 'hashing-v1-d32'; wanted encoder 'hashing-v1-d64'"):
        build_dense_index(corpus, HashingEncoder(64), folder)
    with pytest.raises(ValueError, match="kind 'dense'; wanted kind 'bm25'"):
        open_index(folder, kind="bm25")
    other = write_corpus(tmp_path / "other.jsonl", 50, "page")
    with pytest.raises(ValueError, match=r"another corpus, c\.jsonl .* wanted other\.jsonl"):
        open_index(folder, corpus=other)
    with pytest.raises(DataError, match="expected an index made by 'hiexp index', got none"):
        open_index(tmp_path)
    with pytest.raises(DataError, match="expected an empty directory or an index"):
        build_dense_index(corpus, HashingEncoder(32), tmp_path)


def test_an_opened_index_answers_like_the_cached_one_and_names_its_encoder(corpus, tmp_path):
    folder = build_dense_index(corpus, HashingEncoder(64), tmp_path / "index", shard_rows=7)
    tool = open_index(folder, corpus=corpus, kind="dense")
    cached = DenseTool.from_corpus(corpus, HashingEncoder(64), tmp_path / "cache")
    queries = ["passage number 3", "about 5", "\ud800 half a pair", "", "‮\u200b\x00"]
    assert tool.search(queries, 4) == cached.search(queries, 4)
    assert tool.identity != cached.identity  # other shards
    (folder / "vectors_00001.npy").write_bytes(b"cut")
    assert not is_whole(folder)
    with pytest.raises(DataError, match="damaged"):
        open_index(folder)


def test_float16_takes_half_and_finds_the_same(corpus, tmp_path):
    single = build_dense_index(corpus, HashingEncoder(256), tmp_path / "single")
    half = build_dense_index(corpus, HashingEncoder(256), tmp_path / "half", dtype="float16")
    sizes = [(folder / "vectors_00000.npy").stat().st_size - 128 for folder in (single, half)]
    assert sizes == [50 * 256 * 4, 50 * 256 * 2]
    found = [open_index(folder).search(["passage number 3", "T17"], 5) for folder in (single, half)]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="dtype: expected float32 or float16, got 'int8'"):
        build_dense_index(corpus, HashingEncoder(256), tmp_path / "wrong", dtype="int8")


def test_empty_passages_are_left_out_and_counted(tmp_path):
    rows = [{"text": "a b"}, {"text": "  "}, {"title": "\u200b", "text": "\x00"}, {"title": "only", "text": ""}]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool = DenseTool.from_corpus(corpus, HashingEncoder(32), tmp_path / "cache")
    assert [doc.id for doc in tool.search(["a b"], 9)[0]] == ["1", "4"]
    assert tool.documents.empty_passages == 2
    corpus.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: expected passages with text, got empty ones only"):
        DenseTool.from_corpus(corpus, HashingEncoder(32), tmp_path / "cache")


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("st:intfloat/e5-base-v2", ("query: ", "passage: ")),
        ("st:models/multilingual-e5-small/", ("query: ", "passage: ")),
        ("st:intfloat/e5-base-v2?prefix=query: ", ("", "")),
        ("st:intfloat/multilingual-e5-large-instruct", ("", "")),
        ("st:sentence-transformers/all-MiniLM-L6-v2", ("", "")),
        ("st:nine50/base", ("", "")),
        ("hashing:64", ("", "")),
    ],
)
def test_e5_models_get_their_prefixes(spec, want):
    encoder = HashingEncoder(64)
    encoder.spec = spec
    assert e5_prefixes(encoder) == want


def test_prefixes_reach_the_encoder(corpus, tmp_path):
    encoder = CountingEncoder()
    encoder.spec = "st:e5-small"
    tool = DenseTool.from_corpus(corpus, encoder, tmp_path / "cache")
    assert encoder.texts[1] == "passage: T0\npassage number 0 of 50, about 0"
    tool.search(["who"], 1)
    assert encoder.texts[-1] == "query: who"
    plain = DenseTool.from_corpus(corpus, encoder, tmp_path / "cache", passage_prefix="", query_prefix="q ")
    plain.search(["who"], 1)
    assert encoder.texts[-1] == "q who"
    assert plain.identity != tool.identity


@pytest.mark.parametrize("kind", ["exact", "flat", "ivf", "hnsw"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_estimate_covers_the_disk(tmp_path, kind, dtype):
    corpus = write_corpus(tmp_path / "c.jsonl", 3000)
    folder = build_dense_index(corpus, HashingEncoder(64), tmp_path / "index", dtype=dtype)
    if kind in ("ivf", "hnsw"):
        pytest.importorskip("faiss")
    open_index(folder, method=kind)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = (folder / "documents.jsonl").stat().st_size / 3000
    estimate = memory_estimate(3000, 64, kind, dtype=dtype, text_bytes=round(text))
    assert 0.93 * used < estimate.disk < 1.07 * used


def test_estimates_of_wikipedia():
    plan = memory_estimate(21_015_324, 768, "exact", dtype="float16")
    assert plan.disk - 21_015_324 * 678 == 21_015_324 * 768 * 2
    assert plan.resident < 1 << 28
    assert memory_estimate(21_015_324, 768, "flat").resident > 21_015_324 * 768 * 4
    for wrong in ((0, 768, "exact"), (10, 768, "tree"), (10, 1.5, "exact")):
        with pytest.raises(ValueError, match="expected"):
            memory_estimate(*wrong)
