"""The exactness of hiexp.linkage as properties over thousands of random and adversarial inputs.

The oracle (reference_clustering) recomputes every distance from the definitions in extended precision, so it accepts
any order of ties and nothing else. Rounding that is allowed, with s the largest height of the full tree:

    single, complete          1e-13 of the height: every height is one distance of two input rows
    average, weighted over    1e-13 of the height: means of positive distances
    euclidean, manhattan
    ward, average, weighted   1e-13 of s: distances of centroids, whose own digits end at s
    over centroids
    euclidean, sqeuclidean    1e-150 of s, or its square: the squares of smaller distances are no normal float64
    cosine                    rows of unit length are rounded, which moves a distance h by up to 2 e sqrt(h) + e^2
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra

import hiexp
from hiexp.ops import reference_clustering as reference

METHODS = ("ward", "average", "weighted", "complete", "single")
METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan")
CASES = [
    (method, metric)
    for method in METHODS
    for metric in METRICS
    if method != "ward" or metric in ("euclidean", "cosine")
]
RTOL = 1e-13
UNIT_ROUNDING = 4e-16  # of a row of unit length
TINIEST = 5e-324  # below float64's normal range a distance is right to this

every_case = pytest.mark.parametrize(("method", "metric"), CASES)


def from_centroids(method, metric):
    return method == "ward" or (method in ("average", "weighted") and metric in ("cosine", "sqeuclidean"))


def allowed_rounding(method, metric, heights, largest, rtol=RTOL):
    """Of each height, as the table above says; ``largest``: s."""
    heights = np.asarray(heights, np.longdouble)
    allowed = rtol * (largest if from_centroids(method, metric) else heights) + 4 * TINIEST
    if metric in ("euclidean", "sqeuclidean"):
        allowed = allowed + (1e-150 if metric == "euclidean" else 1e-320) * 64 * largest
    if metric == "cosine":
        unit = 8 * UNIT_ROUNDING
        # Under ward the height is the distance of unit rows itself, elsewhere half its square.
        allowed = allowed + (unit if from_centroids(method, metric) else unit * np.sqrt(heights) + unit**2)
    return allowed


def assert_exact(X, Z, method, metric, rtol=RTOL, largest=None):
    """Every merge joins a closest pair, at its distance, in ascending order. ``largest``: s, if Z is not full."""
    excess, error = reference.greedy_excess(X, Z, method, metric)
    largest = Z[:, 2].max(initial=0.0) if largest is None else largest
    allowed = allowed_rounding(method, metric, Z[:, 2], largest, rtol)
    assert (excess <= allowed).all(), f"{method} {metric}: a closer pair by {excess.max():.3g}"
    assert (np.abs(error) <= allowed).all(), f"{method} {metric}: height off by {np.abs(error).max():.3g}"
    assert (np.diff(Z[:, 2]) >= 0.0).all()


# Adversarial kinds: (rng, n, d) -> rows. None is zero under cosine.


def normal(rng, n, d):
    return rng.normal(size=(n, d))


def duplicated(rng, n, d):
    return rng.normal(size=(max(1, n // 3), d))[rng.integers(0, max(1, n // 3), n)]


def all_equal(rng, n, d):
    return np.tile(rng.normal(size=d), (n, 1))


def grid(rng, n, d):
    return rng.integers(1, 4, size=(n, d)).astype(float)


def signed_grid(rng, n, d):
    X = rng.integers(-2, 3, size=(n, d)).astype(float)
    X[~X.any(axis=1)] = 1.0
    return X


def offset(rng, n, d):
    return rng.normal(size=(n, d)) + 1e6


def equidistant(rng, n, d):
    return np.eye(n)


def star(rng, n, d):
    return np.vstack([np.full(n, 1.0 / n), np.eye(n)[1:] * 3])


def geometric(rng, n, d):
    return np.column_stack([np.ones(n), 1.3 ** np.arange(n)])


def shrinking(rng, n, d):
    return np.column_stack([np.ones(n), 2.0 ** -np.arange(n)])[rng.permutation(n)]


def line(rng, n, d):
    return np.arange(1.0, n + 1)[:, None]


def blobs(rng, n, d):
    return 20 * rng.normal(size=(4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))


def far_and_near(rng, n, d):
    return 1e8 * rng.normal(size=(3, d))[rng.integers(0, 3, n)] + rng.normal(size=(n, d))


def nearly_equal(rng, n, d):
    return 1.0 + np.finfo(float).eps * rng.integers(0, 3, size=(n, d))


def heavy_tails(rng, n, d):
    return np.exp(12 * rng.normal(size=(n, d)))


KINDS = (
    normal, duplicated, all_equal, grid, signed_grid, offset, equidistant, star, geometric, shrinking, line, blobs,
    far_and_near, nearly_equal, heavy_tails,
)  # fmt: skip


@st.composite
def kinds(draw, most=60):
    kind = draw(st.sampled_from(KINDS))
    n, d = draw(st.integers(1, most)), draw(st.sampled_from((1, 2, 3, 5, 8, 17)))
    return kind(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), n, d)


@every_case
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(X=kinds())
def test_every_merge_is_a_global_minimum(method, metric, X):
    Z = hiexp.linkage(X, method, metric)
    assert Z.shape == (len(X) - 1, 4)
    assert_exact(X, Z, method, metric)


# Small matrices of any numbers whose squares are normal float64: shrinking leads to the smallest counterexample.
values = st.floats(-1e150, 1e150, allow_nan=False).filter(lambda x: x == 0.0 or abs(x) > 1e-150)
few_values = st.sampled_from((0.0, 1.0, -1.0, 2.0, 3.0, 1e-3, 1e9))
matrices = st.tuples(st.integers(1, 9), st.integers(1, 3)).flatmap(
    lambda shape: st.one_of(extra.arrays(float, shape, elements=elements) for elements in (values, few_values))
)


@every_case
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(X=matrices)
def test_any_small_matrix(method, metric, X):
    if metric == "cosine":
        X[~X.any(axis=1), 0] = 1.0
    assert_exact(X, hiexp.linkage(X, method, metric), method, metric)


@every_case
@pytest.mark.parametrize("kind", [normal, grid, offset, blobs, far_and_near, heavy_tails])
def test_a_few_larger_inputs(method, metric, kind):
    X = kind(np.random.default_rng(1), 100, 6)
    assert_exact(X, hiexp.linkage(X, method, metric), method, metric)


@every_case
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 1), (3, 1), (40, 1), (1, 4096), (2, 4096), (9, 4096)])
def test_extreme_shapes(method, metric, n, d):
    X = np.random.default_rng(n + d).normal(size=(n, d))
    Z = hiexp.linkage(X, method, metric)
    assert Z.shape == (n - 1, 4)
    assert_exact(X, Z, method, metric)


@every_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(X=kinds(30))
def test_float32_rows(method, metric, X):
    X = X.astype(np.float32)
    Z = hiexp.linkage(X, method, metric)
    assert_exact(X, Z, method, metric, rtol=1e-6)
    if from_centroids(method, metric) or method == "single":  # here float32 rows are float64 rows from the start
        np.testing.assert_array_equal(Z, hiexp.linkage(X.astype(np.float64), method, metric))


@every_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(X=kinds(30), exponent=st.integers(-440, 440))
def test_powers_of_two_change_only_the_scale(method, metric, X, exponent):
    # From 1e-265 to 1e265, or the root of that: its square is the distance.
    exponent = exponent if metric == "sqeuclidean" else 2 * exponent
    power = {"sqeuclidean": 2 * exponent, "cosine": 0}.get(metric, 0 if metric == "cosine" else exponent)
    expected = hiexp.linkage(X, method, metric)
    with np.errstate(under="ignore"):
        expected[:, 2] = np.ldexp(expected[:, 2], power)
        scaled = np.ldexp(X, exponent)
    if (np.ldexp(scaled, -exponent) == X).all() and (expected[:, 2] > 1e-290).all():  # nothing fell out of the range
        np.testing.assert_array_equal(hiexp.linkage(scaled, method, metric), expected)


@every_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(integers=extra.arrays(np.int64, st.tuples(st.integers(2, 12), st.integers(1, 3)), elements=st.integers(0, 9000)))
def test_denormals(method, metric, integers):
    X = integers * TINIEST
    if metric == "cosine":
        X[~X.any(axis=1), 0] = TINIEST
    assert_exact(X, hiexp.linkage(X, method, metric), method, metric)


@every_case
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(X=kinds(40), quantile=st.floats(0, 1), nudge=st.sampled_from((0.0, 1e-9, -1e-9)))
def test_threshold_gives_a_valid_partial_tree(method, metric, X, quantile, nudge):
    full = hiexp.linkage(X, method, metric)[:, 2]
    threshold = float(np.quantile(full, quantile)) * (1 + nudge) if len(full) else 1.0
    partial = hiexp.linkage(X, method, metric, threshold=threshold)
    assert (partial[:, 2] < threshold).all()
    assert_exact(X, partial, method, metric, largest=full.max(initial=0.0))
    # Nothing is left below the threshold.
    margin = allowed_rounding(method, metric, threshold, full.max(initial=0.0))
    assert reference.next_height(X, partial, method, metric) >= threshold - margin


@every_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(n=st.integers(2, 90), d=st.integers(2, 9), quantile=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_without_ties_the_partial_tree_is_a_prefix(method, metric, n, d, quantile, seed):
    X = normal(np.random.default_rng(seed), n, d)
    full = hiexp.linkage(X, method, metric)
    threshold = float(np.quantile(full[:, 2], quantile))
    expected = full[full[:, 2] < threshold]
    partial = hiexp.linkage(X, method, metric, threshold=threshold)
    if method in ("average", "weighted") and not from_centroids(method, metric):
        # Updates of distances round by the order of merges, which a threshold may change.
        np.testing.assert_allclose(partial, expected[: len(partial)], rtol=RTOL)
        assert len(expected) - len(partial) in (-1, 0, 1)
    else:
        np.testing.assert_array_equal(partial, expected)


@every_case
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(X=kinds(60), threads=st.integers(2, 5), copies=st.sampled_from((1, 6)))
def test_threads_change_nothing(method, metric, X, threads, copies):
    rng = np.random.default_rng(0)
    X = np.vstack([X] + [X * rng.uniform(0.5, 2.0, X.shape) for _ in range(copies - 1)])
    one = hiexp.linkage(X, method, metric, n_threads=1)
    np.testing.assert_array_equal(hiexp.linkage(X, method, metric, n_threads=threads), one)


@every_case
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(n=st.integers(2, 120), d=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
def test_order_of_rows_changes_only_names(method, metric, n, d, seed):
    rng = np.random.default_rng(seed)
    X = normal(rng, n, d)
    heights = hiexp.linkage(X, method, metric)[:, 2]
    np.testing.assert_allclose(hiexp.linkage(X[rng.permutation(n)], method, metric)[:, 2], heights, rtol=1e-12)


# Precomputed distances: any symmetric matrix will do, triangle inequality or not.
few_distances = st.sampled_from((0.0, 1.0, 2.0, 3.0))
any_distances = st.floats(0.0, 1e300).filter(lambda x: x == 0.0 or x > 1e-290)
condensed = st.integers(2, 24).flatmap(
    lambda n: st.one_of(
        extra.arrays(np.float64, n * (n - 1) // 2, elements=elements, fill=st.nothing() if n < 9 else None)
        for elements in (few_distances, any_distances)
    )
)


def square_of(y):
    n = round((1 + np.sqrt(1 + 8 * len(y))) / 2)
    square = np.zeros((n, n), y.dtype)
    square[np.triu_indices(n, 1)] = y
    return square + square.T


@pytest.mark.parametrize("method", METHODS[1:])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(y=condensed)
def test_precomputed_distances(method, y):
    Z = hiexp.linkage(y, method, "precomputed")
    assert_exact(square_of(y), Z, method, "precomputed")
    np.testing.assert_array_equal(hiexp.linkage(square_of(y), method, "precomputed"), Z)
    np.testing.assert_array_equal(hiexp.linkage(y, method, "precomputed", n_threads=3), Z)
    threshold = float(np.median(Z[:, 2]))
    partial = hiexp.linkage(y, method, "precomputed", threshold=threshold)
    assert (partial[:, 2] < threshold).all()
    assert_exact(square_of(y), partial, method, "precomputed")


@pytest.mark.parametrize("method", METHODS[1:])
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(y=condensed)
def test_precomputed_float32(method, y):
    y = np.minimum(y, 1e30).astype(np.float32)
    assert_exact(square_of(y), hiexp.linkage(y, method, "precomputed"), method, "precomputed", rtol=1e-6)


@every_case
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(n=st.integers(2, 60), d=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
def test_precomputed_equals_rows(method, metric, n, d, seed):
    X = normal(np.random.default_rng(seed), n, d)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True) if metric == "cosine" else X
    y = reference.pair_distances(unit, "euclidean" if method == "ward" else metric).astype(np.float64)
    Z = hiexp.linkage(X, method, metric)
    np.testing.assert_allclose(hiexp.linkage(y, method, "precomputed"), Z, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(reference.linkage(y, method, "precomputed"), Z, rtol=1e-9, atol=1e-12)


def test_the_oracle_sees_wrong_trees():
    X = normal(np.random.default_rng(0), 30, 4)
    Z = hiexp.linkage(X, "average")
    for method in ("weighted", "complete", "single", "ward"):
        with pytest.raises(AssertionError):
            assert_exact(X, Z, method, "euclidean")
    higher = Z.copy()
    higher[-1, 2] *= 1 + 1e-12
    with pytest.raises(AssertionError, match="height off"):
        assert_exact(X, higher, "average", "euclidean")
    # The second closest pair of points first: a valid tree shape, at the right heights, in the wrong order.
    y = np.array([1.0, 5.0, 5.0, 5.0, 5.0, 2.0])
    wrong = np.array([[2.0, 3.0, 2.0, 2.0], [0.0, 1.0, 1.0, 2.0], [4.0, 5.0, 5.0, 4.0]])
    with pytest.raises(AssertionError, match="closer pair"):
        assert_exact(square_of(y), wrong, "single", "precomputed")
    with pytest.raises(ValueError, match="row 0"):
        reference.greedy_excess(X, Z[:, [1, 0, 2, 3]], "average", "euclidean")
    assert reference.next_height(square_of(y), wrong[:1], "single", "precomputed") == 1.0
