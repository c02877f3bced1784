"""Nearest rows of sharded vectors: exact in bounded memory, or by faiss with the found rows scored exactly.

Scores are inner products of the stored rows in float64, rounded to six decimals, ties to the earlier row: the same
passages in the same order from every method that found them, whatever the BLAS, the batch or the block.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.dense_index import ShardedVectors
from hiexp.agent.index_memory import BLOCK_CELLS

SCORE_DECIMALS = 6
# Twice the worst rounding error of a float32 dot product of unit vectors (d * 2^-24, for d up to 4096).
_MARGIN = 5e-4
Ranked = list[tuple[int, float]]


class Searcher(Protocol):
    """Finds rows of one index."""

    def search(self, queries: NDArray[np.float32], top_k: int) -> list[Ranked]:
        """Per query (q, d) the best ``(row, score)``, sorted by (-score, row)."""
        ...


class ExactSearcher:
    """All rows are compared, shard by shard; memory is bounded by two blocks whatever the size of the index."""

    def __init__(self, vectors: ShardedVectors) -> None:
        self._vectors = vectors

    def search(self, queries: NDArray[np.float32], top_k: int) -> list[Ranked]:
        """As :class:`Searcher`. Queries go in batches of at most BLOCK_CELLS / 1024, each one pass over the shards."""
        batch = BLOCK_CELLS // 1024
        found: list[Ranked] = []
        for start in range(0, len(queries), batch):
            found += self._pass(queries[start : start + batch], top_k)
        return found

    def _pass(self, queries: NDArray[np.float32], top_k: int) -> list[Ranked]:
        candidates = [_Candidates(top_k) for _ in queries]
        cells = min(BLOCK_CELLS, BLOCK_CELLS // max(1, len(queries)) * self._vectors.dim)
        for first, block in self._vectors.blocks(cells):
            scores = queries @ block.T  # (q, rows)
            for kept, row_scores in zip(candidates, scores, strict=True):
                kept.add(first, row_scores)
        return [rank(self._vectors, query, kept.rows(), top_k) for query, kept in zip(queries, candidates, strict=True)]


class _Candidates:
    """Rows of one query that may be among its best ``top_k``, kept while blocks pass by."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._rows, self._scores = np.empty(0, np.int64), np.empty(0, np.float32)
        self._least = np.float32(-np.inf)

    def add(self, first: int, scores: NDArray[np.float32]) -> None:
        new = np.flatnonzero(scores >= self._least)
        if len(new) == 0:
            return
        self._rows = np.concatenate([self._rows, new + first])
        self._scores = np.concatenate([self._scores, scores[new]])
        if len(self._scores) > self._top_k:
            place = len(self._scores) - self._top_k
            self._least = np.partition(self._scores, place)[place] - np.float32(_MARGIN)
            kept = self._scores >= self._least
            self._rows, self._scores = self._rows[kept], self._scores[kept]

    def rows(self) -> NDArray[np.int64]:
        return self._rows


def rank(vectors: ShardedVectors, query: NDArray[np.float32], rows: NDArray[np.int64], top_k: int) -> Ranked:
    """The best ``top_k`` of ``rows`` by exact score."""
    rows = np.sort(rows)  # a stable sort by score then leaves ties in the order of rows
    # One row at a time: a matrix product may round differently with the number of rows.
    scores = np.round((vectors.take(rows) * query.astype(np.float64)).sum(axis=1), SCORE_DECIMALS)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))
