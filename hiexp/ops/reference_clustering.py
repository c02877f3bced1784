"""Agglomerative clustering straight from the definitions: the slow, obvious oracle of ``hiexp.linkage``.

Nothing is updated from earlier results: after every merge the distances of the new cluster are computed from its
members and the input, in extended precision where the platform has it. O(n^3) time; for n up to a few hundred.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Clusters:
    """The clusters so far, one in each slot of 0..n-1 that is still in use, and the distances between them.

    Args:
        X: (n, d) rows, or (n, n) distances if ``metric`` is precomputed.
        method, metric: as in ``hiexp.linkage``.

    Distance of the clusters A and B, of a and b rows x and y:

        ward      sqrt(2 a b / (a + b)) |mean x - mean y|, rows scaled to unit length under cosine; from precomputed
                  distances sqrt(2 a b / (a + b) (m(A, B) - m(A, A) / 2 - m(B, B) / 2)), m the mean of squared distances
        average   mean of all d(x, y); weighted the same with weights of the rows that every merge halves
        complete  largest of all d(x, y); single the smallest
    """

    def __init__(self, X: np.ndarray, method: str, metric: str) -> None:
        n = len(X)
        self.method, self.metric = method, metric
        rows = np.zeros((n, 1)) if metric == "precomputed" else _rows(X, metric)
        self.pairs = np.asarray(X, np.longdouble) if metric == "precomputed" else pair_distances(rows, metric)
        self.rows = rows - rows[0]  # so that means of offset rows keep their digits
        self.weights = np.eye(n, dtype=np.longdouble)  # row: the weights of the members of the cluster in that slot
        self.means, self.spreads = self.rows.copy(), np.zeros(n, np.longdouble)  # used by ward alone
        self.used = np.ones(n, bool)
        self.distances = np.full((n, n), np.inf, np.longdouble)
        for slot in range(n):
            self._measure(slot)

    def merge(self, a: int, b: int) -> None:
        """The union of the clusters in slots a and b goes to slot a; slot b is no longer used."""
        share = {"weighted": 0.5}.get(self.method, self._count(a) / (self._count(a) + self._count(b)))
        self.weights[a] = share * self.weights[a] + (1 - share) * self.weights[b]
        self.used[b] = False
        self.weights[b] = 0
        if self.method == "ward":
            self.means[a] = self.weights[a] @ self.rows
            self.spreads[a] = self.weights[a] @ (self.pairs**2 @ self.weights[a])
        self.distances[b, :] = self.distances[:, b] = np.inf
        self._measure(a)

    def _count(self, slot: int) -> int:
        return int(np.count_nonzero(self.weights[slot]))

    def _measure(self, slot: int) -> None:
        others = self.used.copy()
        others[slot] = False
        found = self._to_all(slot)[others]
        self.distances[slot, others] = self.distances[others, slot] = found

    def _to_all(self, slot: int) -> np.ndarray:
        """(n,) distances from one slot to all, of which those to unused ones mean nothing."""
        if self.method == "ward":
            return self._ward(slot)
        if self.method in ("average", "weighted"):
            means: np.ndarray = self.weights @ (self.pairs @ self.weights[slot])
            return means
        member = self.weights > 0
        if self.method == "complete":
            farthest: np.ndarray = np.where(member, self.pairs[:, member[slot]].max(axis=1), -np.inf).max(axis=1)
            return farthest
        nearest: np.ndarray = np.where(member, self.pairs[:, member[slot]].min(axis=1), np.inf).min(axis=1)
        return nearest

    def _ward(self, slot: int) -> np.ndarray:
        counts = np.maximum(np.count_nonzero(self.weights, axis=1), 1)
        factor = 2.0 * counts * counts[slot] / (counts + counts[slot])
        if self.metric == "precomputed":
            between = self.weights @ (self.pairs**2 @ self.weights[slot])
            squares = np.maximum(between - self.spreads / 2 - self.spreads[slot] / 2, 0)
        else:
            squares = ((self.means - self.means[slot]) ** 2).sum(axis=1)
        heights: np.ndarray = np.sqrt(factor * squares)
        return heights


def pair_distances(rows: np.ndarray, metric: str) -> np.ndarray:
    """(n, n) distances of rows (n, d), which have unit length if ``metric`` is cosine."""
    distances = np.empty((len(rows), len(rows)), np.longdouble)
    for i, row in enumerate(rows):
        difference = rows - row
        if metric == "manhattan":
            distances[i] = np.abs(difference).sum(axis=1)
            continue
        squares = (difference**2).sum(axis=1)
        # For unit vectors 1 - <u, v> = |u - v|^2 / 2, without the cancellation.
        distances[i] = {"euclidean": np.sqrt(squares), "cosine": squares / 2, "sqeuclidean": squares}[metric]
    return distances


def linkage(X: np.ndarray, method: str = "ward", metric: str = "euclidean") -> np.ndarray:
    """Merge the closest pair until one cluster is left; ties go to the lexicographically first pair of slots.

    Args:
        X, method, metric: as in ``Clusters``.

    Returns:
        (n - 1, 4) float64, SciPy's layout.
    """
    n = len(X)
    clusters = Clusters(X, method, metric)
    node, size = list(range(n)), [1] * n
    Z = np.empty((n - 1, 4))
    for step in range(n - 1):
        a, b = divmod(int(clusters.distances.argmin()), n)
        size[a] += size[b]
        Z[step] = min(node[a], node[b]), max(node[a], node[b]), clusters.distances[a, b], size[a]
        node[a] = n + step
        clusters.merge(a, b)
    return Z


def greedy_excess(X: np.ndarray, Z: np.ndarray, method: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """How far ``Z`` is from "every merge joins the two closest clusters", whatever it does with ties.

    Args:
        X, method, metric: as in ``Clusters``. Z: (m, 4), m <= n - 1.

    Returns:
        (m,) distance of the merged pair less the smallest distance of all pairs before that merge, and
        (m,) height in ``Z`` less the distance of the merged pair. Both are 0 but for rounding in a right tree.

    Raises:
        ValueError: a row of ``Z`` merges what is not a cluster at that point, or has a wrong order or size.
    """
    excess, error = np.empty(len(Z), np.longdouble), np.empty(len(Z), np.longdouble)
    clusters = Clusters(X, method, metric)
    for step, (a, b) in enumerate(_slots(Z, len(X))):
        excess[step] = clusters.distances[a, b] - clusters.distances.min()
        error[step] = Z[step, 2] - clusters.distances[a, b]
        clusters.merge(a, b)
    return excess, error


def next_height(X: np.ndarray, Z: np.ndarray, method: str, metric: str) -> float:
    """The smallest distance that is left after the merges of ``Z`` (m, 4); infinity if one cluster is."""
    clusters = Clusters(X, method, metric)
    for a, b in _slots(Z, len(X)):
        clusters.merge(a, b)
    return float(clusters.distances.min())


def _slots(Z: np.ndarray, n: int) -> Iterator[tuple[int, int]]:
    """The two slots that each row of ``Z`` merges, by the rules of SciPy's layout."""
    slot, size = {i: i for i in range(n)}, dict.fromkeys(range(n), 1)
    for step, (left, right, _, count) in enumerate(Z):
        if left not in slot or right not in slot or left >= right or count != size[left] + size[right]:
            raise ValueError(f"Z: row {step}, {Z[step]}, is no merge of two clusters, smaller number first")
        a, b = slot.pop(left), slot.pop(right)
        slot[n + step], size[n + step] = a, size[left] + size[right]
        yield a, b


def _rows(X: np.ndarray, metric: str) -> np.ndarray:
    rows = np.asarray(X).astype(np.longdouble)
    if metric == "cosine":
        rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return rows
