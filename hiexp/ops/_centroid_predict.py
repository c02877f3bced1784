"""Nearest cluster of new rows for the linkages whose clusters are centroids, by the linkage's own distance.

With c the centroid of cluster B, b its number of rows, and rows scaled to unit length under cosine, the distance of a
new row x to B is one formula, up to a monotone function that is the same for every B:

    scale_B |x - c_B|^2 + spread_B

    ward                  scale 2 b / (b + 1), spread 0: the squared height at which {x} and B would merge
    average, weighted     scale 1, spread the mean of |y - c_B|^2 over the members y of B: the mean of |x - y|^2, which
                          for unit rows is twice the mean of 1 - <x, y>. Members weigh the same for average; for
                          weighted half of what their parent in the tree weighs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_BLOCK = 1024  # rows whose distances to all centroids are held at a time


class Centroids(NamedTuple):
    """centres (k, d), scale (k,), spread (k,), all float64, of rows divided by ``unit`` so that squares stay finite."""

    centres: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    unit: float


def has_centroids(method: str, metric: str) -> bool:
    """Whether the clusters of a linkage are known by their centroids."""
    if method == "ward":
        return metric in ("euclidean", "cosine")
    return method in ("average", "weighted") and metric in ("sqeuclidean", "cosine")


def centroids(rows: np.ndarray, labels: np.ndarray, Z: np.ndarray, method: str, metric: str) -> Centroids:
    """Centroids of the clusters ``labels`` (n,) of ``rows`` (n, d), cut from the tree ``Z``."""
    k = int(labels.max()) + 1
    unit = 1.0 if metric == "cosine" else _power_of_two(max(abs(float(rows.min())), abs(float(rows.max()))))
    counts = np.bincount(labels, minlength=k).astype(np.float64)
    weights = _leaf_weights(Z, labels, k) if method == "weighted" else 1.0 / counts[labels]
    centres, spread = np.zeros((k, rows.shape[1])), np.zeros(k)
    for begin in range(0, len(rows), _BLOCK):
        span = slice(begin, begin + _BLOCK)
        np.add.at(centres, labels[span], weights[span, None] * (prepared(rows[span], metric) / unit))
    if method == "ward":
        return Centroids(centres, 2.0 * counts / (counts + 1.0), spread, unit)
    for begin in range(0, len(rows), _BLOCK):
        span = slice(begin, begin + _BLOCK)
        squares = ((prepared(rows[span], metric) / unit - centres[labels[span]]) ** 2).sum(axis=1)
        np.add.at(spread, labels[span], weights[span] * squares)
    return Centroids(centres, np.ones(k), spread, unit)


def nearest(rows: np.ndarray, clusters: Centroids, metric: str) -> np.ndarray:
    """Labels (m,) int64 of the nearest clusters of ``rows`` (m, d); of equally near ones the lowest."""
    labels = np.empty(len(rows), np.int64)
    shift = clusters.centres.mean(axis=0)  # products after a common shift keep the digits of offset data
    centres = clusters.centres - shift
    norms = (centres**2).sum(axis=1)
    for begin in range(0, len(rows), _BLOCK):
        block = prepared(rows[begin : begin + _BLOCK], metric, begin) / clusters.unit - shift
        squares = (block**2).sum(axis=1)[:, None] + norms
        squares -= 2.0 * block @ centres.T
        distances = clusters.scale * np.maximum(squares, 0.0) + clusters.spread
        labels[begin : begin + _BLOCK] = distances.argmin(axis=1)
    return labels


def prepared(rows: np.ndarray, metric: str, first: int = 0) -> np.ndarray:
    """Rows where the centroids live: float64, of unit length under cosine. ``first``: the number of the first row."""
    rows = rows.astype(np.float64)
    if metric != "cosine":
        return rows
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not largest.all():
        row = first + int(largest.argmin())
        raise ValueError(f"X: expected nonzero rows with metric='cosine', got all zeros in row {row}")
    rows /= largest  # no overflow and no underflow in the squares
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _power_of_two(value: float) -> float:
    """The largest power of two that is not above ``value``, 1 for 0: dividing by it does not round."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1) if value else 1.0


def _leaf_weights(Z: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """(n,) weight of each row in its cluster: halved at every merge on the way down from the cluster's root."""
    n = len(labels)
    weights = np.ones(2 * n)
    for step in range(n - k - 1, -1, -1):
        left, right = int(Z[step, 0]), int(Z[step, 1])
        weights[left] = weights[right] = weights[n + step] / 2.0
    return weights[:n]
