"""Linkage over distance matrices: complete and the metrics without a centroid form, precomputed distances, float32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiexp
from hiexp import _core
from hiexp.ops import reference_clustering as reference

CASES = [
    *(("complete", metric) for metric in ("euclidean", "sqeuclidean", "cosine", "manhattan")),
    *((method, metric) for method in ("average", "weighted") for metric in ("euclidean", "manhattan")),
    ("single", "manhattan"),
]
FLOAT32_CASES = [("complete", metric) for metric in ("euclidean", "sqeuclidean", "cosine")]
METHODS = ("ward", "average", "weighted", "complete", "single")
RTOL = 1e-13  # relative to the largest height


def random_rows(rng, n, d):
    return rng.normal(size=(n, d))


def duplicated(rng, n, d):
    return rng.normal(size=(max(1, n // 3), d))[rng.integers(0, max(1, n // 3), n)]


def grid(rng, n, d):
    return rng.integers(1, 4, size=(n, d)).astype(float)


def offset(rng, n, d):
    return rng.normal(size=(n, d)) + 1e6


def equidistant(rng, n, d):
    return np.eye(n)


def star(rng, n, d):
    return np.vstack([np.full(n, 1.0 / n), np.eye(n)[1:] * 3])


def near_ties(rng, n, d):
    # Grid points moved by less than float32 can see.
    return grid(rng, n, d) + 1e-9 * rng.normal(size=(n, d))


def pairs_of_twins(rng, n, d):
    X = rng.normal(size=(n, d))
    X[1::2] = X[: n // 2 * 2 : 2] + 1e-7 * rng.normal(size=(n // 2, d))
    return X


def blobs(rng, n, d):
    return 20 * rng.normal(size=(4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))


def geometric(rng, n, d):
    return np.column_stack([np.ones(n), 1.3 ** np.arange(n)])


def huge(rng, n, d):
    return rng.normal(size=(n, d)) * 1e150


KINDS = (random_rows, duplicated, grid, offset, equidistant, star, near_ties, pairs_of_twins, blobs, geometric, huge)


def assert_greedy(X, Z, method, metric):
    """Every merge joins the closest pair there is, at its distance."""
    excess, error = reference.greedy_excess(X, Z, method, metric)
    largest = Z[:, 2].max(initial=0.0)
    scale = max(1.0, largest) if metric == "cosine" else largest or 1.0
    np.testing.assert_allclose(excess / scale, 0.0, rtol=0.0, atol=RTOL)
    np.testing.assert_allclose(error / scale, 0.0, rtol=0.0, atol=RTOL)
    assert (np.diff(Z[:, 2]) >= 0.0).all()


def precomputed(condensed, n, method, threshold=np.inf, n_threads=1, progress=None):
    return _core.linkage_precomputed(condensed, n, getattr(_core.LinkageMethod, method), threshold, n_threads, progress)


def distances(X):
    i, j = np.triu_indices(len(X), 1)
    return np.sqrt(((X[i] - X[j]) ** 2).sum(axis=1))


@pytest.mark.parametrize(("method", "metric"), CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 30), d=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_merge_is_a_global_minimum(method, metric, kind, n, d, seed):
    X = kind(np.random.default_rng(seed), n, d)
    Z = hiexp.linkage(X, method, metric)
    assert Z.shape == (n - 1, 4)
    assert_greedy(X, Z, method, metric)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_inputs_of_some_size(method, metric, kind):
    X = kind(np.random.default_rng(3), 70, 4)
    assert_greedy(X, hiexp.linkage(X, method, metric), method, metric)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (17, 7), (131, 33), (1100, 24)])
def test_equals_scipy_without_ties(method, metric, n, d):
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(n)
    X = blobs(rng, n, d) if n > 100 else rng.normal(size=(n, d))
    expected = scipy.linkage(X, method, "cityblock" if metric == "manhattan" else metric)
    np.testing.assert_allclose(hiexp.linkage(X, method, metric), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", [random_rows, grid, near_ties, blobs])
def test_threads_do_not_matter(method, metric, kind):
    X = kind(np.random.default_rng(11), 900, 9)
    one, four = (hiexp.linkage(X, method, metric, n_threads=n) for n in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(("method", "metric"), FLOAT32_CASES)
def test_float32_matrix_gives_the_float64_tree(method, metric):
    rng = np.random.default_rng(6)
    X = rng.normal(size=(40, 48))[rng.integers(0, 40, 900)] + rng.normal(size=(900, 48))
    step = rng.normal(size=(50, 48)) / 100  # rows in the middle of two others, but for less than float32 sees
    X[:50], X[50:100] = X[100:150] + step, X[100:150] - step * (1 + 1e-7)
    Z, stats = hiexp.linkage(X, method, metric, return_stats=True)
    assert stats["matrix_dtype"] == "float32"
    assert stats["rechecks"] > 0
    rows = X / np.linalg.norm(X, axis=1, keepdims=True) if metric == "cosine" else X
    square = distances(rows) ** 2
    condensed = {"euclidean": np.sqrt(square), "sqeuclidean": square, "cosine": square / 2}[metric]
    exact, exact_stats = precomputed(condensed, len(X), method)
    assert exact_stats["matrix_dtype"] == "float64"
    np.testing.assert_array_equal(Z[:, [0, 1, 3]], exact[:, [0, 1, 3]])
    np.testing.assert_allclose(Z[:, 2], exact[:, 2], rtol=1e-13)


@pytest.mark.parametrize("kind", [equidistant, near_ties])
def test_ties_that_float32_cannot_decide_take_a_float64_matrix(kind):
    X = kind(np.random.default_rng(2), 250, 3)
    Z, stats = hiexp.linkage(X, "complete", return_stats=True)
    assert stats["matrix_dtype"] == "float64"
    exact, _ = precomputed(distances(X), len(X), "complete")
    np.testing.assert_allclose(Z[:, 2], exact[:, 2], rtol=1e-12)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
def test_partial_tree_is_a_prefix(method, metric, fraction):
    X = blobs(np.random.default_rng(5), 600, 12)
    full = hiexp.linkage(X, method, metric)
    at = int(fraction * len(full))
    between = (full[at, 2] + full[at + 1, 2]) / 2
    partial = hiexp.linkage(X, method, metric, threshold=between)
    np.testing.assert_allclose(partial, full[: at + 1], rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 18, 131, 700])
def test_precomputed_equals_scipy(method, n, dtype):
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    condensed = distances(np.random.default_rng(n).normal(size=(n, 5))).astype(dtype)
    before = condensed.copy()
    condensed.flags.writeable = False
    results = [precomputed(condensed, n, method, n_threads=threads)[0] for threads in (1, 3)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(condensed, before)
    expected = scipy.linkage(condensed.astype(np.float64), method) if n > 1 else np.zeros((0, 4))
    np.testing.assert_allclose(results[0], expected, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), n=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_precomputed_merges_are_global_minima(method, kind, n, seed):
    X = kind(np.random.default_rng(seed), n, 4)
    X = X / np.abs(X).max()
    Z, stats = precomputed(distances(X), n, method)
    assert stats["algorithm"] == "matrix"
    # Ward's update of squared distances cancels: half the digits of small heights, as in SciPy.
    excess, error = reference.greedy_excess(X, Z, method, "euclidean")
    tolerance = (1e-7 if method == "ward" else RTOL) * max(Z[-1, 2], 1e-300)
    np.testing.assert_allclose(excess, 0.0, atol=tolerance)
    np.testing.assert_allclose(error, 0.0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_precomputed_threshold(method):
    X = blobs(np.random.default_rng(1), 400, 6)
    full, _ = precomputed(distances(X), 400, method)
    partial, _ = precomputed(distances(X), 400, method, threshold=(full[200, 2] + full[201, 2]) / 2)
    np.testing.assert_allclose(partial, full[:201], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-1000, -660, 660, 1000])
@pytest.mark.parametrize("share", [None, 0.3, 0.9])
def test_precomputed_at_any_scale(method, power, share):
    # 2^660 is about 1e200: squares of such distances are no float64.
    y = distances(blobs(np.random.default_rng(8), 80, 5))
    expected, _ = precomputed(y, 80, method)
    threshold = np.inf if share is None else float(np.quantile(expected[:, 2], share))
    expected = expected[expected[:, 2] < threshold]
    expected[:, 2] = np.ldexp(expected[:, 2], power)
    Z, _ = precomputed(np.ldexp(y, power), 80, method, threshold=np.ldexp(threshold, power))
    assert len(Z) > 20
    np.testing.assert_allclose(Z, expected, rtol=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [5e-324, 1e-200, 1e-30, 1e30, 1e200, 1.2e308])
def test_precomputed_equal_distances_of_any_size(method, value):
    Z, _ = precomputed(np.full(6, value), 4, method)
    heights = reference.linkage(1.0 - np.eye(4), method, "precomputed")[:, 2]
    np.testing.assert_allclose(Z[:, 2], value * heights, rtol=1e-13, atol=5e-324)
    assert len(precomputed(np.full(6, value), 4, method, threshold=value)[0]) == 0
    assert len(precomputed(np.full(6, value), 4, method, threshold=np.nextafter(value, np.inf))[0]) >= 2


@pytest.mark.parametrize("method", ["average", "weighted"])
def test_precomputed_means_of_the_largest_distances(method):
    y = distances(blobs(np.random.default_rng(9), 60, 3))
    y *= np.ldexp(1.0, 1023) / y.max()
    expected, _ = precomputed(y / 2**40, 60, method)
    expected[:, 2] *= 2**40
    np.testing.assert_allclose(precomputed(y, 60, method)[0], expected, rtol=1e-13)


def test_precomputed_count_is_checked():
    with pytest.raises(ValueError, match=r"condensed: expected n \(n - 1\) / 2 .* n = 5 .* got 9"):
        precomputed(np.zeros(9), 5, "average")


@pytest.mark.parametrize("n", [2, 46_341, 65_537, 92_683, 2**31])
def test_offsets_are_64_bit(n):
    # n = 46,341: n^2 > 2^31; 65,537: n (n - 1) / 2 > 2^31.
    assert _core.triangle_offset(n) == n * (n - 1) // 2
    assert _core.triangle_offset(n - 1) == (n - 1) * (n - 2) // 2
    assert _core.condensed_offset(0, 1, n) == 0
    assert _core.condensed_offset(n - 2, n - 1, n) == n * (n - 1) // 2 - 1
    i, j = n // 3, n - 1
    assert _core.condensed_offset(i, j, n) == n * i - i * (i + 1) // 2 + j - i - 1


class StopError(Exception):
    pass


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_progress_and_stopping(method, metric):
    X = np.random.default_rng(0).normal(size=(300, 8))
    calls = []
    hiexp.linkage(X, method, metric, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("merge", 299, 299)

    def stop(*call):
        raise StopError

    with pytest.raises(StopError):
        hiexp.linkage(X, method, metric, progress=stop)
    with pytest.raises(StopError):
        precomputed(distances(X), 300, method, progress=stop)
