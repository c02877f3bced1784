"""Exact nearest rows by inner product: the same answer on any machine, with any number of threads.

Scores are float64 sums of exact products in a fixed order, rounded to six decimals, so that equal titles tie exactly
and ties go to the lower row. Few rows are read: csrc/retrieval keeps half a byte a column, the cell that a value lies
in, and leaves a row as soon as a proven upper bound (what the cells allow, Cauchy-Schwarz on the columns not read, plus
all rounding errors) shows that it cannot be returned. Dense vectors are turned to their principal axes first, so that
few columns say most; sparse ones (the hashing encoder) keep their axes: only the columns that a query has are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp import _core

CODED_ROWS = 2048  # below this, scoring every row takes less than 0.2 ms
_SPARSE = 0.3  # share of non-zero values up to which reading the query's own columns beats turning the axes
_STAGE = 64  # columns after which a block may be left
_SAMPLE = 16_384  # rows that axes and scales are taken from; both may be anything, the bounds hold
_STEP = 0.3352  # width of 16 even cells with the least mean square error, of normal values of spread 1
_CHUNK = 8192  # rows turned at a time
_ROWS_PER_THREAD = 50_000  # starting a thread takes about 30 us
_UNIT = 2.0**-24  # rounding of float32


class ExactIndex:
    """Inner-product search over rows.

    Args:
        vectors: (n, d) float32, finite; not copied, must not change.
        least: (n,) float64, the least score at which each row is returned where a search names no threshold.
        n_threads: threads of a search; None: as many as pay, at most the cores this process may use.

    Raises:
        ValueError: a vector that is not finite (NaN, infinity).
    """

    def __init__(
        self, vectors: NDArray[np.float32], least: NDArray[np.float64], *, n_threads: int | None = None
    ) -> None:
        vectors = np.ascontiguousarray(vectors, np.float32)
        n, d = vectors.shape
        self._n_threads = min(_cores(), 1 + n // _ROWS_PER_THREAD) if n_threads is None else n_threads
        self._dim = d
        if n < CODED_ROWS or d == 0:
            _check_finite(vectors, "vectors")
            self._core: Any = _core.ExactIndex(vectors, least, None, None, [], 0.0)
            return
        sample = vectors[:: -(-n // _SAMPLE)]
        _check_finite(sample, "vectors")
        rotation = None if np.count_nonzero(sample) <= _SPARSE * sample.size else _axes(sample)
        edges = _sparse_edges(sample) if rotation is None else _dense_edges(sample @ rotation)
        ends = [d] if rotation is None else [*range(_STAGE, d, _STAGE), d]
        relative = _relative_error(d, rotation)
        self._core = _core.ExactIndex(vectors, least, rotation, edges, ends, relative)
        points = self._core.points()
        for start in range(0, len(points), _CHUNK):
            rows = vectors[points[start : start + _CHUNK]]
            _check_finite(rows, "vectors")
            self._core.store(start, rows if rotation is None else rows @ rotation)

    def search(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        hidden: Sequence[Sequence[int]],
        threshold: float | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Per query the ``top_k`` best ``(row, score)``, sorted by (-score, row).

        Args:
            queries: (q, d) float32, finite.
            hidden: per query, rows it must not get, ascending.
            threshold: the least score; None takes each row's own.

        Raises:
            ValueError: a query that is not finite, or of another length than the rows.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._dim:
            raise ValueError(f"queries: expected (q, {self._dim}), got {queries.shape}")
        _check_finite(queries, "queries")
        found: list[list[tuple[int, float]]] = self._core.search(queries, top_k, threshold, hidden, self._n_threads)
        return found


def _axes(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """Principal axes (d, d), largest first, one a column. Not centred: products, not distances, are sought."""
    covariance = (sample.T @ sample).astype(np.float64)
    _, axes = np.linalg.eigh(covariance)
    return np.ascontiguousarray(axes[:, ::-1], np.float32)


def _dense_edges(turned: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the 16 cells of each column meet, (15, d), evenly spaced around the mean."""
    steps = _STEP * np.arange(-7, 8)
    return np.asarray(turned.mean(axis=0) + np.outer(steps, turned.std(axis=0)), np.float32)


def _sparse_edges(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same around zero, which has a cell of its own; (14, d), narrow where values are frequent."""
    filled = np.maximum((sample != 0).sum(axis=0), 1)
    spread = np.sqrt((sample.astype(np.float64) ** 2).sum(axis=0) / filled)
    steps = [NormalDist(0.0, 2.0**0.5).inv_cdf(k / 14) for k in range(1, 14)]
    edges = np.outer(steps, spread)
    edges[6] = 0.0
    return np.asarray(np.insert(edges, 7, np.finfo(np.float32).smallest_subnormal, axis=0), np.float32)


def _relative_error(d: int, rotation: NDArray[np.float32] | None) -> float:
    """Bound of |true product - product of the turned vectors, summed in float32| / (|query| |row|), any order of sums.

    A float32 product of d terms is off by at most ``d 2^-24 |x| |y|`` (Higham, Accuracy and Stability, ch. 3); turning
    a vector multiplies that by the norm of the absolute values of the axes, at most the square root of d.
    """
    sums = (d + 16) * _UNIT
    if rotation is None:
        return 2 * sums
    exact = rotation.astype(np.float64)
    skew = float(np.linalg.norm(exact.T @ exact - np.eye(d)))
    return float(2 * sums + 2.1 * sums * d**0.5 + skew)


def _check_finite(vectors: NDArray[np.float32], name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {bad[0]}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
