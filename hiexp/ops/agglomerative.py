"""Estimator with scikit-learn's interface over :func:`hiexp.linkage`; scikit-learn itself is not needed.

Parameters, attributes and the numbers of the labels follow ``sklearn.cluster.AgglomerativeClustering``, so that
replacing the import is enough. Beyond it: weighted linkage, ward over cosine and over precomputed distances,
``device``, ``n_threads``, ``predict`` where clusters are centroids, ``linkage_matrix_``, ``distances_`` without being
asked for, and ``compute_full_tree=False`` with a threshold. Not offered: ``connectivity``, and SciPy's rarer metrics by
name (a callable can compute them).
"""

from __future__ import annotations

import heapq
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hiexp.ops._centroid_predict import centroids, has_centroids, nearest
from hiexp.ops._checks import check_choice, describe
from hiexp.ops._estimator import Estimator, not_fitted
from hiexp.ops.clustering import METHODS, check_count, check_metric, check_threshold, cut_tree, like, linkage


class AgglomerativeClustering(Estimator):
    """Agglomerative clustering of the rows of a matrix, exact and multithreaded.

    Args:
        n_clusters: number of clusters; None with ``distance_threshold``.
        metric: as in :func:`hiexp.linkage`. ``"precomputed"``: ``fit`` takes (n, n) distances. A callable is called
            once as ``metric(X)`` with all rows and returns (n, n) distances, which it holds in memory: for small n.
        memory: None, a folder, or an object with joblib's ``cache``: the tree of the same data and parameters is then
            read from there. A folder needs joblib.
        connectivity: must be None; a graph of allowed merges is not supported.
        compute_full_tree: ``"auto"`` or True build the full tree, as scikit-learn does without a connectivity. False
            stops at the ``distance_threshold``, which saves time and leaves ``children_`` short; the partition is the
            same. With ``n_clusters`` it changes nothing.
        linkage: ``"ward"``, ``"average"``, ``"weighted"``, ``"complete"`` or ``"single"``.
        distance_threshold: merge iff the height is below it; then ``n_clusters`` must be None.
        compute_distances: accepted for compatibility; ``distances_`` is always there.
        device: as in :func:`hiexp.linkage`.
        n_threads: as in :func:`hiexp.linkage`.

    Attributes:
        labels_: (n,) int64 cluster of each row, numbered as scikit-learn numbers them, from the top of the tree.
        n_clusters_: number of clusters.
        children_: (m, 2) int64 merged nodes, leaves 0..n-1, row i makes node n + i.
        distances_: (m,) float64 heights of the merges.
        linkage_matrix_: (m, 4) float64, SciPy's layout.
        n_leaves_: number of rows. ``n_connected_components_``: always 1. ``n_features_in_``: number of columns.
        feature_names_in_: (d,) names of the columns, only where ``X`` was a data frame with names.

    ``fit`` raises what :func:`hiexp.linkage` raises, and ValueError for parameters that do not go together.
    """

    _estimator_type = "clusterer"

    def __init__(
        self,
        n_clusters: int | None = 2,
        *,
        metric: str | Callable[[np.ndarray], Any] = "euclidean",
        memory: Any = None,
        connectivity: Any = None,
        compute_full_tree: bool | str = "auto",
        linkage: str = "ward",
        distance_threshold: float | None = None,
        compute_distances: bool = False,
        device: str | None = None,
        n_threads: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.memory = memory
        self.connectivity = connectivity
        self.compute_full_tree = compute_full_tree
        self.linkage = linkage
        self.distance_threshold = distance_threshold
        self.compute_distances = compute_distances
        self.device = device
        self.n_threads = n_threads

    def fit(self, X: Any, y: Any = None) -> AgglomerativeClustering:
        """Cluster the rows of ``X`` (n, d), n >= 2; ``y`` is ignored."""
        self._check_parameters()
        rows = self._samples(X, fitting=True)
        n = len(rows)
        if self.n_clusters is not None:
            check_count("n_clusters", self.n_clusters, 1, n)
        Z = self._tree(rows)
        first_seen = cut_tree(Z, n, threshold=self.distance_threshold, n_clusters=self.n_clusters)
        self.n_leaves_, self.n_connected_components_ = n, 1
        self.n_clusters_ = int(first_seen.max()) + 1
        labels = _from_the_top(Z, first_seen, self.n_clusters_) if len(Z) == n - 1 else first_seen
        self._centroids = None
        if isinstance(self.metric, str) and has_centroids(self.linkage, self._metric()):
            self._centroids = centroids(rows, labels, Z, self.linkage, self._metric())
        self.labels_ = like(X, labels)
        self.linkage_matrix_ = like(X, Z)
        self.children_ = like(X, Z[:, :2].astype(np.int64))
        self.distances_ = like(X, Z[:, 2].copy())
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        """``fit(X).labels_``."""
        return self.fit(X).labels_

    def predict(self, X: Any) -> Any:
        """Labels (m,) int64 of new rows (m, d): the nearest clusters by the linkage's own distance, ties to the lowest.

        For a new row x, a cluster B of b rows and its centroid c (unit rows under cosine):

            ward                           sqrt(2 b / (b + 1)) |x - c|, the height at which {x} and B would merge
            average, weighted sqeuclidean  mean of |x - y|^2 over the members y of B
            average, weighted cosine       mean of 1 - cos(x, y) over the members y of B

        where weighted's mean gives each member half the weight of its parent in the tree. ValueError for the other
        linkages, whose clusters are no centroids, and for what ``fit`` refuses.
        """
        if not hasattr(self, "labels_"):
            raise not_fitted("predict: expected a fitted estimator, got one before fit()")
        if self._centroids is None:
            raise ValueError(
                "predict: expected clusters that are centroids (ward; average or weighted over cosine or sqeuclidean), "
                f"got linkage={self.linkage!r} with metric={self.metric!r}"
            )
        return like(X, nearest(self._samples(X, fitting=False), self._centroids, self._metric()))

    def __sklearn_tags__(self) -> Any:
        # Only scikit-learn asks, from its pipelines and checks, so it is there.
        from sklearn.utils import InputTags, Tags, TargetTags

        inputs = InputTags(pairwise=self.metric == "precomputed", positive_only=self.metric == "precomputed")
        return Tags(estimator_type="clusterer", target_tags=TargetTags(required=False), input_tags=inputs)

    def _check_parameters(self) -> None:
        check_choice("linkage", self.linkage, METHODS)
        if not callable(self.metric):
            self._metric()
        if self.connectivity is not None:
            got = describe(self.connectivity)
            raise ValueError(f"connectivity: expected None (merges along a graph are not supported), got {got}")
        if (self.n_clusters is None) == (self.distance_threshold is None):
            raise ValueError(
                "n_clusters, distance_threshold: Exactly one of the two has to be set and the other None, got "
                f"n_clusters={self.n_clusters!r} and distance_threshold={self.distance_threshold!r}"
            )
        check_threshold("distance_threshold", self.distance_threshold)
        if not isinstance(self.compute_full_tree, bool | np.bool_) and self.compute_full_tree != "auto":
            raise ValueError(f"compute_full_tree: expected 'auto', True or False, got {self.compute_full_tree!r}")
        if self.memory is not None and not isinstance(self.memory, str) and not hasattr(self.memory, "cache"):
            raise TypeError(
                f"memory: expected None, a folder's name or an object with cache(), got {describe(self.memory)}"
            )

    def _metric(self) -> str:
        return check_metric("metric", self.metric, self.linkage)

    def _tree(self, rows: np.ndarray) -> np.ndarray:
        threshold = None if self.compute_full_tree else self.distance_threshold
        data, metric = (self.metric(rows), "precomputed") if callable(self.metric) else (rows, self._metric())
        if metric == "precomputed" and (np.ndim(data) != 2 or np.shape(data) != (len(rows), len(rows))):
            raise ValueError(f"X: Distance matrix should be square, got matrix of shape {np.shape(data)}")
        build = linkage if self.memory is None else _cached(self.memory)
        Z: np.ndarray = build(
            data, self.linkage, metric, threshold=threshold, device=self.device, n_threads=self.n_threads
        )
        return Z


def _cached(memory: Any) -> Callable[..., Any]:
    if isinstance(memory, str):
        try:
            memory = importlib.import_module("joblib").Memory(memory, verbose=0)
        except ModuleNotFoundError as error:
            raise ImportError("memory: a folder as cache needs joblib: pip install joblib") from error
    cached: Callable[..., Any] = memory.cache(linkage)
    return cached


def _from_the_top(Z: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The clusters ``labels`` (n,) of a full tree, numbered as scikit-learn does.

    It starts from the root and splits the highest node k - 1 times, in a heap; a cluster's number is its place there.
    """
    n = len(labels)
    children = Z[:, :2].astype(np.int64)
    heap = [-(2 * n - 2)]
    for _ in range(k - 1):
        left, right = children[-heap[0] - n].tolist()
        heapq.heappush(heap, -left)
        heapq.heappushpop(heap, -right)
    leaf = np.concatenate([np.arange(n), children[:, 0]])  # of each node, by doubling steps down its left children
    while (leaf >= n).any():
        leaf = leaf[leaf]
    numbers = np.empty(k, np.int64)
    numbers[labels[leaf[-np.array(heap)]]] = np.arange(k)
    renumbered: np.ndarray = numbers[labels]
    return renumbered
