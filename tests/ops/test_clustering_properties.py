"""The exactness of hiexp.linkage as properties over thousands of random and adversarial inputs.

The oracle (reference_clustering) recomputes every distance from the definitions in extended precision, so it accepts any
order of ties and nothing else. Rounding that is allowed, with s the largest height of the tree:

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


def assert_exact(X, Z, method, metric, rtol=RTOL):
    """Every merge joins a closest pair, at its distance, in ascending order."""
    excess, error = reference.greedy_excess(X, Z, method, metric)
    heights = Z[:, 2].astype(np.longdouble)
    scale = heights.max(initial=0.0) if from_centroids(method, metric) else heights
    allowed = rtol * scale + 4 * TINIEST
    if metric in ("euclidean", "sqeuclidean"):
        allowed = allowed + (1e-150 if metric == "euclidean" else 1e-320) * 64 * heights.max(initial=0.0)
    if metric == "cosine":
        # Under ward the height is the distance of unit rows itself, elsewhere half its square.
        unit = UNIT_ROUNDING * np.ones_like(heights)
        allowed = allowed + (8 * unit if method == "ward" else 8 * unit * np.sqrt(heights) + 8 * unit**2)
        if from_centroids(method, metric):
            allowed = allowed + 8 * unit
    assert (excess <= allowed).all(), f"{method} {metric}: a closer pair by {(excess / (heights + TINIEST)).max():.3g}"
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
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
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
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(X=matrices)
def test_any_small_matrix(method, metric, X):
    if metric == "cosine":
        X[~X.any(axis=1), 0] = 1.0
    assert_exact(X, hiexp.linkage(X, method, metric), method, metric)
