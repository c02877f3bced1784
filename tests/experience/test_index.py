"""The pruned search returns what scoring every row returns, to the bit, whatever the vectors look like."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.experience import index as index_module
from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.index import ExactIndex


def reference(vectors, query, top_k, hidden, least):
    """Every row scored with numpy in float64; least: a number or one a row."""
    scores = np.round((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1), 6)
    served = scores >= least
    served[list(hidden)] = False
    rows = np.flatnonzero(served)
    order = rows[np.lexsort((rows, -scores[rows]))][:top_k]
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


def unit(rows):
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)).astype(np.float32)


def make_vectors(kind, n, d, rng):
    if kind == "equal":
        return np.repeat(unit(rng.standard_normal((1, d))), n, axis=0)
    if kind == "duplicates":  # few distinct rows, some of them zero
        return np.concatenate([np.zeros((1, d), np.float32), unit(rng.standard_normal((5, d)))])[rng.integers(0, 6, n)]
    if kind == "near":  # within the rounding of codes of each other, so that bounds decide nothing
        return unit(rng.standard_normal((1, d)) + 1e-4 * rng.standard_normal((n, d)))
    if kind == "sparse":
        return unit(np.where(rng.random((n, d)) < 0.1, rng.standard_normal((n, d)), 0.0))
    if kind == "low rank":
        return unit(rng.standard_normal((n, 3)) @ rng.standard_normal((3, d)))
    if kind == "scaled":  # no unit rows: norms over ten orders of magnitude
        return (rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-5, 5, (n, 1))).astype(np.float32)
    if kind == "outlier":  # one row beyond the range of all other codes, not in the sample that sets the range
        rows = unit(rng.standard_normal((n, d)))
        rows[n // 2] *= 1000
        return rows
    return unit(rng.standard_normal((n, d)))


KINDS = ["random", "equal", "duplicates", "near", "sparse", "low rank", "scaled", "outlier"]


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 700),
    d=st.sampled_from([1, 3, 7, 8, 9, 31, 33, 64, 100, 129, 200, 384, 520]),
    top_k=st.sampled_from([1, 2, 5, 63, 1000]),
    threshold=st.sampled_from([None, -1.0, 0.0, 0.1, 0.35, 0.99, 1.5]),
    n_threads=st.sampled_from([1, 3]),
    coded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_equals_scoring_every_row(kind, n, d, top_k, threshold, n_threads, coded, seed):
    rng = np.random.default_rng(seed)
    vectors = make_vectors(kind, n, d, rng) if n else np.empty((0, d), np.float32)
    least = rng.choice([-1.0, 0.0, 0.3], n)
    queries = [unit(rng.standard_normal((2, d)))]
    if n:
        queries += [vectors[rng.integers(0, n, 2)], np.zeros((1, d), np.float32)]
    queries = np.concatenate(queries)
    hidden = [sorted(rng.choice(n, min(n, 3 * i), replace=False).tolist()) for i in range(len(queries))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "CODED_ROWS", 1 if coded else 10**9)
        patch.setattr(index_module, "_SAMPLE", 100)
        patch.setattr(index_module, "_CHUNK", 128)
        found = ExactIndex(vectors, least, n_threads=n_threads).search(queries, top_k, hidden, threshold)
    floor = least if threshold is None else threshold
    for query, out, hits in zip(queries, hidden, found, strict=True):
        assert hits == reference(vectors, query, top_k, out, floor)


@pytest.mark.parametrize("kind", ["random", "hashing", "duplicates"])
def test_many_rows(kind):
    rng = np.random.default_rng(3)
    if kind == "hashing":
        words = [f"word{i}" for i in range(400)]
        texts = [" ".join(rng.choice(words, 6)) for _ in range(8_020)]
        rows = HashingEncoder(256).encode(texts)
    else:
        rows = make_vectors(kind, 8_020, 384, rng)
    vectors, queries = rows[20:], rows[:20]
    index = ExactIndex(vectors, np.full(len(vectors), 0.2), n_threads=2)
    for threshold in (None, -1.0, 0.5):
        found = index.search(queries, 4, [[i, i + 20] for i in range(20)], threshold)
        for i, hits in enumerate(found):
            floor = 0.2 if threshold is None else threshold
            assert hits == reference(vectors, queries[i], 4, [i, i + 20], floor)


def test_a_search_reads_few_rows_where_few_can_win():
    """Without pruning the result would be right and slow. What is far is changed behind the index, so that a search
    that scored it would return it."""
    rng = np.random.default_rng(0)
    vectors = make_vectors("low rank", 4096, 64, rng)
    index = ExactIndex(vectors, np.full(4096, -1.0), n_threads=1)
    query = vectors[17].copy()
    expected = index.search(query[None], 1, [[]])
    scores = vectors @ query
    vectors[scores < 0.5] = query * 2
    assert index.search(query[None], 1, [[]]) == expected


def test_threads_share_an_index():
    rng = np.random.default_rng(1)
    vectors = make_vectors("random", 6000, 96, rng)
    index = ExactIndex(vectors, np.full(6000, -1.0), n_threads=2)
    alone = [index.search(row[None], 3, [[]]) for row in vectors[:40]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: index.search(row[None], 3, [[]]), vectors[:40])) == alone


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 333])
def test_vectors_that_are_not_finite(coded, bad, row, monkeypatch):
    monkeypatch.setattr(index_module, "CODED_ROWS", 1 if coded else 10**9)
    monkeypatch.setattr(index_module, "_SAMPLE", 10)  # the bad row need not be in the sample
    vectors = make_vectors("random", 500, 20, np.random.default_rng(0))
    vectors[row, 3] = bad
    with pytest.raises(ValueError, match="vectors: expected finite values, got NaN or infinity"):
        ExactIndex(vectors, np.zeros(500))


def test_bad_queries():
    index = ExactIndex(np.eye(4, dtype=np.float32), np.zeros(4))
    with pytest.raises(ValueError, match=r"queries: expected \(q, 4\), got \(1, 3\)"):
        index.search(np.zeros((1, 3), np.float32), 1, [[]])
    with pytest.raises(ValueError, match="queries: expected finite values, got NaN or infinity in row 0"):
        index.search(np.full((1, 4), np.nan, np.float32), 1, [[]])
