"""Exact agglomerative clustering: linkage, flat cuts, and a drop-in for scikit-learn's estimator.

C++ on the CPU, multithreaded. Where clusters are centroids (ward; average and weighted over cosine or squared euclidean
distances) and for single (but over manhattan) memory is O(n d); the rest keeps a triangular matrix of distances. Trees
are exact: candidates may come from float32 products, but only inside a proven error bound; heights are float64.
``reference_clustering`` is the oracle.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp import _core
from hiexp.ops._checks import check_choice, check_number, describe, is_tensor
from hiexp.ops._clustering_cuda import linkage_cuda, wants_cuda
from hiexp.ops._precomputed import condensed_distances

if TYPE_CHECKING:
    from hiexp.ops.agglomerative import AgglomerativeClustering

__all__ = ["METHODS", "METRICS", "AgglomerativeClustering", "cut_tree", "linkage"]

METHODS: tuple[str, ...] = tuple(_core.LinkageMethod.__members__)
METRICS: tuple[str, ...] = tuple(_core.LinkageMetric.__members__)
# Other names of the same metrics in scikit-learn and SciPy.
METRIC_ALIASES = {"l2": "euclidean", "l1": "manhattan", "cityblock": "manhattan"}
# Ward's heights are distances of means, which only euclidean geometry has.
WARD_METRICS = ("euclidean", "cosine", "precomputed")
# Slots are int32; the labels of the tree, up to 2n - 1, are exact in float64 far beyond.
_MAX_ROWS = 2**31 - 1


def __getattr__(name: str) -> Any:
    # On first use, because the estimator's module imports this one.
    if name == "AgglomerativeClustering":
        from hiexp.ops.agglomerative import AgglomerativeClustering

        return AgglomerativeClustering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def linkage(
    X: Any,
    method: str = "ward",
    metric: str = "euclidean",
    *,
    threshold: float | None = None,
    device: str | None = None,
    n_threads: int | None = None,
    return_stats: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> Any:
    """Dendrogram of the rows of ``X``, as ``scipy.cluster.hierarchy.linkage`` gives it.

    Args:
        X: (n, d) vectors, n >= 1, d >= 1: numpy array, torch tensor, anything with ``__dlpack__``, or nested
            sequences. float32 and float64 are used as they are, half precision and integers are converted exactly
            where float64 can hold them. Strided and read-only arrays are fine. With ``metric="precomputed"``:
            distances, (n, n) or condensed (n (n - 1) / 2,) in SciPy's order. They must be finite and not negative; a
            square matrix must have a zero diagonal and be symmetric, both to 1e-10 of its largest entry (1e-5 in
            float32), and its upper triangle is used.
        method: ``"ward"``, ``"average"``, ``"weighted"`` (WPGMA), ``"complete"`` or ``"single"``.
        metric: ``"euclidean"`` (``"l2"``), ``"sqeuclidean"``, ``"cosine"`` (1 - cosine of the angle), ``"manhattan"``
            (``"l1"``, ``"cityblock"``) or ``"precomputed"``. Ward takes euclidean, cosine and precomputed. Ward over
            cosine is ward over the rows scaled to unit length, so its heights are euclidean; over precomputed ones the
            caller vouches that they are euclidean distances.
        threshold: only merges with height < threshold are made, which saves most of the work; None makes all.
        device: None (where ``X`` lives), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. On a GPU run ward with euclidean or
            cosine, average and weighted with sqeuclidean or cosine; ``X`` may be a torch tensor or a cupy array there,
            used without a copy. Trees equal those of the CPU; where distances tie, either takes its own choice.
        n_threads: threads to use, at least 1; None uses every core this process may run on. The result does not
            depend on it.
        return_stats: return ``(Z, stats)``; see below.
        progress: called as ``progress(stage, done, total)``, about ten times a second and at the end, on the calling
            thread: stage ``"scan"`` counts rows of the first pass over all pairs, ``"merge"`` merges. An exception it
            raises ends the call, as Ctrl-C does.

    Returns:
        (m, 4) float64, one row a merge by ascending height: smaller child, larger child, height, number of leaves.
        Leaves are 0..n-1 and row i makes cluster n + i. m = n - 1, or fewer with a threshold. A torch tensor if ``X``
        was one, else a numpy array. Equally high merges come in a fixed order that may differ from SciPy's.

        ``stats`` is a dict: ``algorithm`` ("rounds", "matrix" or "boruvka"), ``rounds``, ``passes`` (distances
        computed, in units of n (n - 1) / 2), ``rescans`` (rows scanned again after the first pass),
        ``certified_share`` (share of scanned rows whose nearest neighbour the low-precision candidates and their bound
        decided), ``exact_rows`` (rows computed in float64 throughout), ``duplicates`` (rows equal to an earlier one),
        ``merges``, ``matrix_dtype`` ("float32" or "float64" of the matrix of distances, "" without one), ``rechecks``
        (distances of clusters that a float32 matrix left open, computed again in float64), ``n_threads``, ``seconds``.

    Raises:
        ValueError: NaN, infinity, a zero row under cosine, no rows or columns, an unknown method or metric, a metric
            that ward has not, distances that break the rules above, a negative or NaN threshold, a device that is not
            there.
        TypeError: a dtype that is not real, or an argument of the wrong type.

    Sources: Murtagh and Contreras, arXiv:1105.0121 (reciprocal nearest neighbours); Muellner, arXiv:1109.2378.
    """
    check_choice("method", method, METHODS)
    metric = check_metric("metric", metric, method)
    limit = check_threshold("threshold", threshold)
    _check_device(device)
    n_threads = _check_threads(n_threads)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable or None, got {describe(progress)}")
    if wants_cuda(X, device):
        z, stats = linkage_cuda(X, method, metric, limit, device, progress)
        return (z, stats) if return_stats else z
    native_method = _core.LinkageMethod.__members__[method]
    if metric == "precomputed":
        distances, n = condensed_distances("X", as_array("X", X))
        z, stats = _core.linkage_precomputed(distances, n, native_method, limit, n_threads, progress)
    else:
        native_metric = _core.LinkageMetric.__members__[metric]
        rows = as_rows("X", X)
        n = len(rows)
        z, stats = _core.linkage(rows, native_method, native_metric, limit, n_threads, progress)
    if limit == math.inf and len(z) < n - 1:
        raise ValueError("X: expected distances that fit float64, got some that overflow; divide X by a constant")
    return (like(X, z), stats) if return_stats else like(X, z)


def cut_tree(Z: Any, n: int, *, threshold: float | None = None, n_clusters: int | None = None) -> Any:
    """Flat clusters of a dendrogram.

    Args:
        Z: (m, 4) linkage matrix with ascending heights, full or cut off at a threshold; numpy array or torch tensor.
        n: number of leaves.
        threshold: merge iff height < threshold (scikit-learn's convention; ``scipy.cluster.hierarchy.fcluster`` merges
            at height == threshold too). Of a tree that was cut off it must not be above the threshold of that cut: the
            tree does not hold the merges beyond, and cannot tell.
        n_clusters: stop at this many clusters, 1..n. Exactly one of the two must be given.

    Returns:
        (n,) int64 labels 0..k-1, numbered by first occurrence. A torch tensor if ``Z`` was one, else a numpy array.

    Raises:
        ValueError: both or none of the two are given; ``Z`` is no linkage matrix of n leaves, or was cut off before the
            asked number of clusters is reached.
    """
    n = check_count("n", n, 1)
    z = _as_linkage(Z, n)
    if (threshold is None) == (n_clusters is None):
        got = "neither" if threshold is None else f"threshold={threshold!r} and n_clusters={n_clusters!r}"
        raise ValueError(f"threshold, n_clusters: expected exactly one of the two, got {got}")
    if n_clusters is None:
        n_merges = int(np.searchsorted(z[:, 2], check_threshold("threshold", threshold), side="left"))
    else:
        n_merges = n - check_count("n_clusters", n_clusters, 1, n)
        if n_merges > len(z):
            raise ValueError(
                f"n_clusters: expected at least {n - len(z)}, the clusters left in a Z of {len(z)} merges (was it cut "
                f"off at a threshold?), got {n_clusters}"
            )
    return like(Z, _core.cut_labels(z, n_merges, n))


def as_rows(name: str, X: Any) -> np.ndarray:
    """``X`` as a C-contiguous (n, d) float32 or float64 array, without a copy where it already is one."""
    rows = as_array(name, X)
    if rows.dtype.kind not in "fiu" or rows.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected real numbers (float32 or float64), got {describe(rows)}")
    if rows.ndim != 2:
        raise ValueError(f"{name}: expected shape (n, d), got {rows.ndim}-D {describe(rows)}")
    n, d = rows.shape
    if n < 1 or d < 1 or n > _MAX_ROWS:
        raise ValueError(f"{name}: expected shape (n, d) with n >= 1, n <= {_MAX_ROWS} and d >= 1, got {(n, d)}")
    small = rows.dtype in (np.float16, np.float32)
    contiguous: np.ndarray = np.ascontiguousarray(rows, dtype=np.float32 if small else np.float64)
    return contiguous


def like(X: Any, result: np.ndarray) -> Any:
    """``result`` as a torch tensor where ``X`` is one."""
    if not is_tensor(X):
        return result
    import torch

    return torch.from_numpy(result).to(X.device)


def check_metric(name: str, metric: Any, method: str) -> str:
    """The metric's own name, where ``method`` has it."""
    metric = METRIC_ALIASES.get(metric, metric) if isinstance(metric, str) else metric
    check_choice(name, metric, (*METRICS, "precomputed"))
    if method == "ward" and metric not in WARD_METRICS:
        names = ", ".join(map(repr, WARD_METRICS))
        raise ValueError(f"{name}: expected one of {names} with method='ward', got {metric!r}")
    return str(metric)


def check_threshold(name: str, threshold: Any) -> float:
    if isinstance(threshold, np.floating | np.integer):
        threshold = float(threshold)
    if threshold is None or (isinstance(threshold, float) and threshold == math.inf):
        return math.inf
    return check_number(name, threshold, 0.0)


def check_count(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """An integer in [minimum, maximum]; numpy's integers too."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")
    return int(value)


def as_array(name: str, X: Any) -> np.ndarray:
    if is_tensor(X):
        if X.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {X.device}")
        if str(X.layout) != "torch.strided":
            raise TypeError(f"{name}: expected a dense tensor, got one with layout {X.layout}")
        X = X.detach()
        # numpy has no bfloat16; every bfloat16 is a float32.
        values: np.ndarray = (X.float() if str(X.dtype) == "torch.bfloat16" else X).numpy()
        return values
    if np.ma.is_masked(X):
        raise ValueError(f"{name}: expected an array without masked entries, got {np.ma.count_masked(X)} masked")
    if isinstance(X, np.ndarray) or not hasattr(X, "__dlpack__"):
        try:
            return np.asarray(X)
        except ValueError as error:
            raise ValueError(f"{name}: expected an (n, d) array, got {type(X).__name__}: {error}") from error
    try:
        array: np.ndarray = np.from_dlpack(X)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected an array in CPU memory, got {type(X).__name__}: {error}") from error
    return array


def _as_linkage(Z: Any, n: int) -> np.ndarray:
    z = as_array("Z", Z.cpu() if is_tensor(Z) else Z)
    if z.dtype.kind not in "fiu":
        raise TypeError(f"Z: expected float64 of shape (m, 4), got {describe(z)}")
    if z.ndim != 2 or z.shape[1] != 4 or len(z) > n - 1:
        raise ValueError(f"Z: expected shape (m, 4) with m <= n - 1 = {n - 1}, got {z.shape}")
    z = np.ascontiguousarray(z, dtype=np.float64)
    descents = np.flatnonzero(~(np.diff(z[:, 2]) >= 0.0))
    if len(descents) or np.isnan(z[:, 2]).any():
        row = int(descents[0]) + 1 if len(descents) else 0
        raise ValueError(f"Z: expected ascending heights, got {z[row, 2]} in row {row}")
    _check_sizes(z, n)
    return z


def _check_sizes(z: np.ndarray, n: int) -> None:
    """A tree of another number of leaves shows in the sizes: its node n would be a leaf here."""
    known = np.concatenate([np.ones(n), z[:, 3]])
    children = z[:, :2]
    if len(z) == 0 or not ((children >= 0) & (children < len(known))).all():
        return  # the native code names nodes that do not exist
    sizes = known[children.astype(np.int64)].sum(axis=1)
    wrong = np.flatnonzero(sizes != z[:, 3])
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"Z: expected a linkage matrix of n = {n} leaves, got {z[row, 3]:g} leaves in row {row}, whose children "
            f"have {sizes[row]:g}"
        )


def _check_device(device: Any) -> None:
    # A torch.device will do too.
    if device is not None and str(device).split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected None, 'cpu', 'cuda' or 'cuda:<index>', got {str(device)!r}")


def _check_threads(n_threads: Any) -> int:
    if n_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return check_count("n_threads", n_threads, 1, 1024)
