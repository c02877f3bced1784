"""Agglomerative clustering straight from the definitions: the slow, obvious oracle of ``hiexp.linkage``.

Nothing is updated: the distance between two clusters is computed from their members every time, in extended precision
where the platform has it. O(n^3) distances or more; for n up to a few hundred.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Cluster(NamedTuple):
    """Rows, and their weights in means under ``weighted``; these sum to 1."""

    members: list[int]
    weights: list[float]

    def union(self, other: Cluster) -> Cluster:
        return Cluster(self.members + other.members, [weight / 2 for weight in self.weights + other.weights])


def cluster_distance(X: np.ndarray, a: Cluster, b: Cluster, method: str, metric: str) -> float:
    """Distance between two clusters of rows of ``X`` (n, d).

    ward: sqrt(2|A||B| / (|A| + |B|)) |mean(A) - mean(B)|, over rows of unit length if ``metric`` is cosine.
    average, complete, single: mean, largest, smallest distance of a member of A to a member of B. weighted: their mean
    with the weights of the members, which every merge halves.
    """
    rows_a, rows_b = _rows(X, a.members, metric), _rows(X, b.members, metric)
    if method == "ward":
        difference = (rows_a - rows_b[0]).mean(axis=0) - (rows_b - rows_b[0]).mean(axis=0)
        weight = 2.0 * len(rows_a) * len(rows_b) / (len(rows_a) + len(rows_b))
        return float(np.sqrt(weight * (difference**2).sum()))
    distances = _distances(rows_a, rows_b, metric)
    if method == "average":
        return float(distances.mean())
    if method == "weighted":
        return float(np.array(a.weights, np.longdouble) @ distances @ np.array(b.weights, np.longdouble))
    return float(distances.max() if method == "complete" else distances.min())


def linkage(X: np.ndarray, method: str = "ward", metric: str = "euclidean") -> np.ndarray:
    """Merge the closest pair until one cluster is left; ties go to the lexicographically first pair of cluster numbers.

    Args:
        X: (n, d) float32 or float64.
        method, metric: as in ``hiexp.linkage``.

    Returns:
        (n - 1, 4) float64, SciPy's layout.
    """
    n = len(X)
    clusters = {i: Cluster([i], [1.0]) for i in range(n)}
    distance = {
        (i, j): cluster_distance(X, clusters[i], clusters[j], method, metric) for i in range(n) for j in range(i + 1, n)
    }
    Z = np.empty((n - 1, 4))
    for step in range(n - 1):
        (a, b), height = min(distance.items(), key=lambda item: (item[1], item[0]))
        union = clusters.pop(a).union(clusters.pop(b))
        distance = {pair: d for pair, d in distance.items() if not {a, b} & set(pair)}
        for other, cluster in clusters.items():
            distance[other, n + step] = cluster_distance(X, cluster, union, method, metric)
        clusters[n + step] = union
        Z[step] = a, b, height, len(union.members)
    return Z


def greedy_excess(X: np.ndarray, Z: np.ndarray, method: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """How far ``Z`` is from "every merge joins the two closest clusters", whatever it does with ties.

    Args:
        X: (n, d); Z: (m, 4), m <= n - 1.

    Returns:
        (m,) distance of the merged pair less the smallest distance of all pairs before that merge, and
        (m,) height in ``Z`` less the distance of the merged pair. Both are 0 but for rounding in a right tree.
    """
    n = len(X)
    clusters = {i: Cluster([i], [1.0]) for i in range(n)}
    distance = np.full((2 * n, 2 * n), np.inf)
    for i in range(n):
        for j in range(i + 1, n):
            distance[i, j] = cluster_distance(X, clusters[i], clusters[j], method, metric)
    excess, error = np.empty(len(Z)), np.empty(len(Z))
    for step, (left, right, height, _) in enumerate(Z):
        a, b = sorted((int(left), int(right)))
        excess[step] = distance[a, b] - distance.min()
        error[step] = height - distance[a, b]
        union = clusters.pop(a).union(clusters.pop(b))
        for gone in (a, b):
            distance[gone, :] = distance[:, gone] = np.inf
        for other, cluster in clusters.items():
            distance[other, n + step] = cluster_distance(X, cluster, union, method, metric)
        clusters[n + step] = union
    return excess, error


def _distances(rows_a: np.ndarray, rows_b: np.ndarray, metric: str) -> np.ndarray:
    differences = rows_a[:, None, :] - rows_b[None, :, :]
    if metric == "manhattan":
        sums: np.ndarray = np.abs(differences).sum(axis=2)
        return sums
    squares: np.ndarray = (differences**2).sum(axis=2)
    if metric == "euclidean":
        return np.sqrt(squares)
    # For unit vectors 1 - <u, v> = |u - v|^2 / 2, without the cancellation.
    return squares / 2 if metric == "cosine" else squares


def _rows(X: np.ndarray, members: list[int], metric: str) -> np.ndarray:
    rows: np.ndarray = np.asarray(X)[members].astype(np.longdouble)
    if metric == "cosine":
        rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return rows
