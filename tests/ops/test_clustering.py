"""hiexp.linkage and cut_tree: against the definitions and SciPy, containers, edges, bad input; see also _properties."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import hiexp
from hiexp.ops import reference_clustering as reference
from hiexp.ops._precomputed import condensed_distances

METHODS = ("ward", "average", "complete", "single")
METRICS = ("euclidean", "cosine")
CASES = [(method, metric) for method in METHODS for metric in METRICS]


def random_rows(rng, n, d):
    return rng.normal(size=(n, d))


def grid(rng, n, d):
    return rng.integers(1, 4, size=(n, d)).astype(float)


def equidistant(rng, n, d):
    return np.eye(n)


def star(rng, n, d):
    # The hub is the nearest neighbour of all others, which are equally far from each other. Not at the origin: cosine.
    return np.vstack([np.full(n, 1.0 / n), np.eye(n)[1:] * 3])


def blobs(rng, n, d):
    return 20 * rng.normal(size=(4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_reference_agrees_without_ties(method, metric):
    X = np.random.default_rng(7).normal(size=(24, 3))
    np.testing.assert_allclose(
        hiexp.linkage(X, method, metric), reference.linkage(X, method, metric), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (17, 7), (130, 33), (1100, 24)])
def test_equals_scipy_without_ties(method, metric, n, d):
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(n)
    X = blobs(rng, n, d) if n > 100 else rng.normal(size=(n, d))
    if d == 1 and metric == "cosine":
        pytest.skip("all angles are 0 or pi")
    rows = X / np.linalg.norm(X, axis=1, keepdims=True) if (method, metric) == ("ward", "cosine") else X
    expected = scipy.linkage(rows, method, "euclidean" if method == "ward" else metric)
    np.testing.assert_allclose(hiexp.linkage(X, method, metric), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", [random_rows, grid, equidistant, star, blobs])
def test_threads_do_not_matter(method, metric, kind):
    X = kind(np.random.default_rng(11), {star: 200, equidistant: 400}.get(kind, 700), 9)
    one, four = (hiexp.linkage(X, method, metric, n_threads=n) for n in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_partial_tree_is_a_prefix(method, metric, fraction):
    X = blobs(np.random.default_rng(5), 600, 12)
    full = hiexp.linkage(X, method, metric)
    at = int(fraction * len(full))
    between = (full[at, 2] + full[at + 1, 2]) / 2
    partial = hiexp.linkage(X, method, metric, threshold=between)
    np.testing.assert_allclose(partial, full[: at + 1], rtol=1e-13)
    if (method, metric) == ("average", "euclidean"):
        return  # sums of distances: their last digits depend on the order of merges
    np.testing.assert_array_equal(partial, full[: at + 1])
    # At a threshold that is a height, that merge itself stays out.
    np.testing.assert_array_equal(hiexp.linkage(X, method, metric, threshold=full[at, 2]), full[:at])


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_float32_input_is_taken_exactly(method, metric):
    X = np.random.default_rng(2).normal(size=(200, 17)).astype(np.float32)
    np.testing.assert_array_equal(hiexp.linkage(X, method, metric), hiexp.linkage(X.astype(np.float64), method, metric))


def test_more_rows_than_the_root_of_int32():
    n = 46_400  # n^2 overflows int32
    X = np.random.default_rng(0).normal(size=(n, 3))
    X[1::2] = X[::2] + 1e-9  # so every row merges with its neighbour, far below all other heights
    Z = hiexp.linkage(X, threshold=1e-6)
    assert sorted(Z[:, 0].tolist()) == list(range(0, n, 2))
    np.testing.assert_array_equal(Z[:, 1], Z[:, 0] + 1)


def test_containers_and_layouts():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(40, 6))
    expected = hiexp.linkage(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    wide = np.zeros((80, 12))
    wide[::2, ::2] = X

    class Exporter:
        def __dlpack__(self, **kwargs):
            return X.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return X.__dlpack_device__()

    for same in (read_only, np.asfortranarray(X), wide[::2, ::2], X.tolist(), Exporter(), X.astype(">f8")):
        np.testing.assert_array_equal(hiexp.linkage(same), expected)
    integers = rng.integers(0, 99, size=(40, 6))
    np.testing.assert_array_equal(hiexp.linkage(integers), hiexp.linkage(integers.astype(float)))


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    Z = hiexp.linkage(X.requires_grad_())
    assert isinstance(Z, torch.Tensor)
    assert Z.dtype == torch.float64
    np.testing.assert_array_equal(Z.numpy(), hiexp.linkage(X.detach().numpy()))
    labels = hiexp.cut_tree(Z, 50, n_clusters=4)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int64
    assert len(labels.unique()) == 4
    half = hiexp.linkage(X.detach().bfloat16())
    np.testing.assert_array_equal(half.numpy(), hiexp.linkage(X.detach().bfloat16().float()).numpy())


def test_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"X: expected a dense tensor, got one with layout torch.sparse_coo"):
        hiexp.linkage(torch.eye(3).to_sparse())


@pytest.mark.parametrize("infinity", [float("inf"), np.float64("inf"), np.float32("inf")])
def test_an_infinite_threshold_is_none(infinity):
    X = np.random.default_rng(0).normal(size=(30, 4))
    np.testing.assert_array_equal(hiexp.linkage(X, threshold=infinity), hiexp.linkage(X))


def test_input_is_left_alone():
    X = np.random.default_rng(0).normal(size=(30, 4))
    before = X.copy()
    hiexp.linkage(X, "average", "cosine")
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_one_and_two_rows(method, metric):
    assert hiexp.linkage([[1.0, 2.0]], method, metric).shape == (0, 4)
    Z = hiexp.linkage([[3.0, 4.0], [4.0, 3.0]], method, metric)
    height = {"euclidean": np.sqrt(2), "cosine": 1 - 24 / 25}[metric]
    if (method, metric) == ("ward", "cosine"):
        height = np.sqrt(2) / 5
    np.testing.assert_allclose(Z, [[0, 1, height, 2]], rtol=1e-14)


@pytest.mark.parametrize(
    ("X", "keywords", "error", "words"),
    [
        ([[1.0], [np.nan]], {}, ValueError, ["X", "finite", "nan", "row 1", "column 0"]),
        ([[1.0, -np.inf]], {}, ValueError, ["X", "finite", "-inf", "row 0", "column 1"]),
        ([[1.0, 1.0], [0.0, -0.0]], {"metric": "cosine"}, ValueError, ["X", "nonzero", "row 1"]),
        (np.zeros((0, 3)), {}, ValueError, ["X", "n >= 1", "(0, 3)"]),
        (np.zeros((3, 0)), {}, ValueError, ["X", "d >= 1", "(3, 0)"]),
        (np.zeros(3), {}, ValueError, ["X", "(n, d)", "(3,)"]),
        (np.zeros((2, 2, 2)), {}, ValueError, ["X", "(n, d)", "(2, 2, 2)"]),
        ([[1.0], [1.0, 2.0]], {}, ValueError, ["X", "(n, d)", "list"]),
        (np.zeros((2, 2), complex), {}, TypeError, ["X", "float", "complex128"]),
        (np.zeros((2, 2), bool), {}, TypeError, ["X", "float", "bool"]),
        ([["a", "b"]], {}, TypeError, ["X", "float", "<U1"]),
        (None, {}, TypeError, ["X", "float", "object"]),
        ([[1.0]], {"method": "centroid"}, ValueError, ["method", "'ward'", "'centroid'"]),
        ([[1.0]], {"metric": "chebyshev"}, ValueError, ["metric", "'cosine'", "'precomputed'", "'chebyshev'"]),
        ([[1.0]], {"metric": None}, ValueError, ["metric", "None"]),
        ([[1.0]], {"metric": "sqeuclidean"}, ValueError, ["metric", "'cosine'", "method='ward'", "'sqeuclidean'"]),
        ([[1.0]], {"metric": "l1"}, ValueError, ["metric", "method='ward'", "'manhattan'"]),
        ([[1.7e308, 1.7e308], [0.0, 0.0]], {}, ValueError, ["X", "fit float64", "overflow"]),
        ([[1e200], [0.0]], {"method": "single", "metric": "sqeuclidean"}, ValueError, ["X", "squared", "overflow"]),
        ([[1.0]], {"progress": 3}, TypeError, ["progress", "callable", "3"]),
        ([[1.0]], {"threshold": -1.0}, ValueError, ["threshold", ">= 0", "-1.0"]),
        ([[1.0]], {"threshold": np.nan}, ValueError, ["threshold", "nan"]),
        ([[1.0]], {"threshold": "1"}, TypeError, ["threshold", "number", "'1'"]),
        ([[1.0]], {"device": "tpu"}, ValueError, ["device", "'cuda'", "'tpu'"]),
        (np.ma.masked_equal([[1.0], [2.0]], 2.0), {}, ValueError, ["X", "masked", "1"]),
        (np.ma.masked_equal([1.0, 2.0, 3.0], 2.0), {"metric": "precomputed"}, ValueError, ["X", "masked", "1"]),
        ([[1.0]], {"n_threads": 0}, ValueError, ["n_threads", "1..", "0"]),
        ([[1.0]], {"n_threads": 1.5}, TypeError, ["n_threads", "integer", "1.5"]),
    ],
)
def test_bad_input_is_named(X, keywords, error, words):
    with pytest.raises(error) as caught:
        hiexp.linkage(X, **keywords)
    for word in words:
        assert word in str(caught.value)


def changed(position, value):
    square = np.ones((5, 5)) - np.eye(5)
    square[position] = value
    return square


@pytest.mark.parametrize(
    ("distances", "error", "words"),
    [
        (changed((1, 3), 1.1), ValueError, ["X", "symmetric", "1.1 at [1, 3]", "1.0 at [3, 1]"]),
        (changed((2, 2), 0.1), ValueError, ["X", "zeros on the diagonal", "0.1 in row 2"]),
        (changed((4, 0), np.nan), ValueError, ["X[4, 0]", "finite", "nan"]),
        (changed((0, 1), np.inf), ValueError, ["X[0, 1]", "finite", "inf"]),
        (changed((3, 2), -0.5), ValueError, ["X[3, 2]", ">= 0", "-0.5"]),
        (np.ones((3, 4)), ValueError, ["X", "(n, n)", "(3, 4)"]),
        (np.ones((0, 0)), ValueError, ["X", "n >= 1", "(0, 0)"]),
        (np.ones((2, 2, 2)), ValueError, ["X", "(n, n)", "(2, 2, 2)"]),
        (np.ones(0), ValueError, ["X", "n >= 2", "0"]),
        (np.ones(7), ValueError, ["X", "n (n - 1) / 2", "7"]),
        ([1.0, 2.0, np.nan], ValueError, ["X[2], points 1 and 2", "finite", "nan"]),
        ([1.0, -2.0, 3.0], ValueError, ["X[1], points 0 and 2", ">= 0", "-2.0"]),
        (np.ones(3, complex), TypeError, ["X", "real", "complex128"]),
        (np.ones((2, 2), bool), TypeError, ["X", "real", "bool"]),
        (None, TypeError, ["X", "real", "object"]),
    ],
)
def test_bad_distances_are_named(distances, error, words):
    with pytest.raises(error) as caught:
        hiexp.linkage(distances, "average", "precomputed")
    for word in words:
        assert word in str(caught.value)


def test_distances_in_many_forms():
    rng = np.random.default_rng(0)
    n = 1100  # more than one block of the checks
    square = rng.integers(1, 9, size=(n, n))
    square = np.triu(square, 1)
    square += square.T
    upper = square[np.triu_indices(n, 1)].astype(np.float64)
    expected = hiexp.linkage(upper, "complete", "precomputed")
    wide = np.zeros((2 * n, 2 * n))
    wide[::2, ::2] = square
    read_only = upper.copy()
    read_only.flags.writeable = False
    noisy = square * (1 + 1e-12 * np.triu(rng.uniform(-1, 0, (n, n))).T) - 1e-12 * np.eye(n)
    for same in (square, square.astype(np.uint8), np.asfortranarray(square), wide[::2, ::2], noisy, read_only):
        np.testing.assert_array_equal(hiexp.linkage(same, "complete", "precomputed"), expected)
    for small in (np.float16, np.float32):
        np.testing.assert_allclose(hiexp.linkage(square.astype(small), "complete", "precomputed"), expected)
    for message, row, column in (("symmetric", 1050, 3), ("zeros", 1060, 1060)):
        bad = square.astype(np.float64)
        bad[row, column] += 0.5
        with pytest.raises(ValueError, match=f"{message}.*{row}"):
            hiexp.linkage(bad, "complete", "precomputed")
    np.testing.assert_array_equal(upper, square[np.triu_indices(n, 1)])
    assert hiexp.linkage([[0.0]], "average", "precomputed").shape == (0, 4)


def test_names_of_other_packages():
    X = np.random.default_rng(0).normal(size=(30, 4))
    for alias, name in (("l1", "manhattan"), ("cityblock", "manhattan"), ("l2", "euclidean")):
        np.testing.assert_array_equal(hiexp.linkage(X, "average", alias), hiexp.linkage(X, "average", name))


def test_square_matrices_do_not_copy_themselves():
    n = 2200
    square = np.ones((n, n)) - np.eye(n)
    tracemalloc.start()
    condensed, size = condensed_distances("X", square)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == n
    assert peak < 0.7 * square.nbytes + 4 * 1024 * 1024 * 8  # the condensed half, and a few blocks
    assert condensed_distances("X", condensed)[0] is condensed


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_cut_by_threshold_equals_scikit_learn(method, metric):
    cluster = pytest.importorskip("sklearn.cluster")
    X = blobs(np.random.default_rng(4), 150, 6)
    if (method, metric) == ("ward", "cosine"):
        pytest.skip("scikit-learn has no ward over cosine")
    Z = hiexp.linkage(X, method, metric)
    for threshold in (Z[60, 2], Z[120, 2] * (1 + 1e-9), Z[-1, 2] * 2):
        theirs = cluster.AgglomerativeClustering(
            n_clusters=None, distance_threshold=threshold * (1 - 1e-12), linkage=method, metric=metric
        ).fit_predict(X)
        ours = hiexp.cut_tree(Z, 150, threshold=threshold)
        assert same_partition(ours, theirs)


def same_partition(a, b):
    return len(set(a)) == len(set(b)) == len(set(zip(a, b, strict=True)))


def test_cut_by_count_and_numbering():
    X = np.array([[9.0], [0.0], [9.5], [0.25], [100.0]])
    Z = hiexp.linkage(X, "single")
    assert hiexp.cut_tree(Z, 5, n_clusters=3).tolist() == [0, 1, 0, 1, 2]
    assert hiexp.cut_tree(Z, 5, n_clusters=1).tolist() == [0] * 5
    assert hiexp.cut_tree(Z, 5, n_clusters=5).tolist() == [0, 1, 2, 3, 4]
    # Merges at the threshold stay out.
    assert hiexp.cut_tree(Z, 5, threshold=0.5).tolist() == [0, 1, 2, 1, 3]
    assert hiexp.cut_tree(Z, 5, threshold=0).tolist() == [0, 1, 2, 3, 4]
    assert hiexp.cut_tree(Z, 5, threshold=np.inf).tolist() == [0] * 5
    assert hiexp.cut_tree(np.zeros((0, 4)), 1, n_clusters=1).tolist() == [0]


GOOD = [[0.0, 1.0, 0.5, 2.0], [2.0, 3.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    ("Z", "n", "keywords", "error", "words"),
    [
        (GOOD, 3, {}, ValueError, ["exactly one", "neither"]),
        (GOOD, 3, {"threshold": 1.0, "n_clusters": 2}, ValueError, ["exactly one", "threshold=1.0", "n_clusters=2"]),
        (GOOD, 3, {"threshold": -0.5}, ValueError, ["threshold", "-0.5"]),
        (GOOD, 3, {"n_clusters": 0}, ValueError, ["n_clusters", "1..3", "0"]),
        (GOOD, 3, {"n_clusters": 4}, ValueError, ["n_clusters", "1..3", "4"]),
        (GOOD, 3, {"n_clusters": 2.0}, TypeError, ["n_clusters", "integer"]),
        (GOOD[:1], 3, {"n_clusters": 1}, ValueError, ["n_clusters", "at least 2", "1 merges", "got 1"]),
        (GOOD, 2, {"n_clusters": 1}, ValueError, ["Z", "n - 1 = 1", "(2, 4)"]),
        (GOOD, 0, {"n_clusters": 1}, ValueError, ["n", ">= 1", "0"]),
        (GOOD[::-1], 3, {"n_clusters": 1}, ValueError, ["Z", "ascending", "row 1"]),
        ([[0.0, 0.0, 0.5, 2.0]], 3, {"n_clusters": 2}, ValueError, ["Z", "row 0", "0."]),
        ([[0.0, 7.0, 0.5, 2.0]], 3, {"n_clusters": 2}, ValueError, ["Z", "row 0", "7."]),
        ([[0.0, 1.0, np.nan, 2.0]], 3, {"n_clusters": 2}, ValueError, ["Z", "ascending", "nan"]),
        ([[0.0, 1.0, 0.5]], 3, {"n_clusters": 2}, ValueError, ["Z", "(m, 4)", "(1, 3)"]),
        (GOOD, 4, {"threshold": 2.0}, ValueError, ["Z", "n = 4", "row 1", "3 leaves", "2"]),
    ],
)
def test_bad_trees_are_named(Z, n, keywords, error, words):
    with pytest.raises(error) as caught:
        hiexp.cut_tree(np.array(Z), n, **keywords)
    for word in words:
        assert word in str(caught.value)
