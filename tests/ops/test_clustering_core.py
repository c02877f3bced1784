"""The native core of hiexp.linkage: centroid forms, statistics, progress, stopping, threads, bad cases."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiexp
from hiexp.ops import reference_clustering as reference

# What has a centroid form or a spanning tree beyond ward, average-cosine and single-euclidean.
CASES = [
    ("weighted", "cosine"),
    ("weighted", "sqeuclidean"),
    ("average", "sqeuclidean"),
    ("single", "sqeuclidean"),
]
CENTROID_CASES = [*CASES[:3], ("ward", "euclidean"), ("ward", "cosine"), ("average", "cosine")]
# Relative to the largest height, as in test_clustering.
RTOL = 1e-13


def normal(rng, n, d):
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


def blobs(rng, n, d):
    return 20 * rng.normal(size=(4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))


def geometric(rng, n, d):
    return np.column_stack([np.ones(n), 1.3 ** np.arange(n)])


def far_and_near(rng, n, d):
    # Two scales, 1e8 apart: squared distances from products would lose all digits of the small one.
    return 1e8 * rng.normal(size=(3, d))[rng.integers(0, 3, n)] + rng.normal(size=(n, d))


KINDS = (normal, duplicated, grid, offset, equidistant, star, blobs, geometric, far_and_near)


def assert_greedy(X, Z, method, metric):
    excess, error = reference.greedy_excess(X, Z, method, metric)
    scale = max(1.0 if metric == "cosine" else 0.0, Z[:, 2].max(initial=0.0)) or 1.0
    np.testing.assert_allclose(excess / scale, 0.0, rtol=0.0, atol=RTOL)
    np.testing.assert_allclose(error / scale, 0.0, rtol=0.0, atol=RTOL)
    assert (np.diff(Z[:, 2]) >= 0.0).all()


@pytest.mark.parametrize(("method", "metric"), CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 32), d=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_merge_is_a_global_minimum(method, metric, kind, n, d, seed):
    X = kind(np.random.default_rng(seed), n, d)
    Z = hiexp.linkage(X, method, metric)
    assert Z.shape == (n - 1, 4)
    assert_greedy(X, Z, method, metric)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_inputs_of_some_size(method, metric, kind):
    X = kind(np.random.default_rng(3), 50, 5)
    assert_greedy(X, hiexp.linkage(X, method, metric), method, metric)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (17, 7), (130, 33), (1100, 24)])
def test_equals_scipy_without_ties(method, metric, n, d):
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(n)
    X = blobs(rng, n, d) if n > 100 else rng.normal(size=(n, d))
    if d == 1 and metric == "cosine":
        X += 100.0  # all at the angle 0
        assert hiexp.linkage(X, method, metric)[0, 2] == 0.0
        return
    np.testing.assert_allclose(
        hiexp.linkage(X, method, metric), scipy.linkage(X, method, metric), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize(("method", "metric"), CASES)
def test_reference_agrees_without_ties(method, metric):
    X = np.random.default_rng(7).normal(size=(24, 3))
    np.testing.assert_allclose(
        hiexp.linkage(X, method, metric), reference.linkage(X, method, metric), rtol=1e-12, atol=1e-15
    )


def test_weighted_differs_from_average():
    # Otherwise the tests of one would pass with the other's update.
    X = np.random.default_rng(7).normal(size=(24, 3))
    for metric in ("cosine", "sqeuclidean"):
        difference = hiexp.linkage(X, "weighted", metric)[:, 2] - hiexp.linkage(X, "average", metric)[:, 2]
        assert np.abs(difference).max() > 1e-3


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", [normal, grid, equidistant, star, blobs])
def test_threads_do_not_matter(method, metric, kind):
    X = kind(np.random.default_rng(11), 700 if kind is not star else 200, 9)
    one, four = (hiexp.linkage(X, method, metric, n_threads=n) for n in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_partial_tree_is_a_prefix(method, metric, fraction):
    X = blobs(np.random.default_rng(5), 600, 12)
    full = hiexp.linkage(X, method, metric)
    at = int(fraction * len(full))
    between = (full[at, 2] + full[at + 1, 2]) / 2
    np.testing.assert_array_equal(hiexp.linkage(X, method, metric, threshold=between), full[: at + 1])
    np.testing.assert_array_equal(hiexp.linkage(X, method, metric, threshold=full[at, 2]), full[:at])


@pytest.mark.parametrize("metric", ["sqeuclidean", "manhattan"])
def test_ward_needs_euclidean_distances(metric):
    with pytest.raises(ValueError, match=r"metric.*ward"):
        hiexp.linkage([[0.0], [1.0]], "ward", metric)


def test_squared_distances_that_overflow_are_refused():
    with pytest.raises(ValueError, match=r"X: .*overflow"):
        hiexp.linkage([[0.0], [1e200]], "average", "sqeuclidean")
    assert hiexp.linkage([[0.0], [1e150]], "average", "sqeuclidean")[0, 2] == 1e150**2


KEYS = {
    "algorithm",
    "rounds",
    "passes",
    "rescans",
    "certified_share",
    "exact_rows",
    "duplicates",
    "merges",
    "n_threads",
    "seconds",
    "matrix_dtype",
    "rechecks",
}


@pytest.mark.parametrize(("method", "metric"), [*CENTROID_CASES, ("single", "euclidean")])
def test_statistics(method, metric):
    X = blobs(np.random.default_rng(0), 900, 16)
    X[::9] = X[1]
    Z, stats = hiexp.linkage(X, method, metric, n_threads=2, return_stats=True)
    assert set(stats) == KEYS
    assert stats["algorithm"] == ("boruvka" if method == "single" else "rounds")
    assert stats["duplicates"] == 100
    assert stats["merges"] == len(Z) == 899
    assert stats["n_threads"] == 2
    assert stats["passes"] >= 1.0
    assert 0.0 <= stats["certified_share"] <= 1.0
    assert stats["rounds"] > 1
    assert stats["seconds"] > 0.0


def test_statistics_of_one_row():
    Z, stats = hiexp.linkage([[1.0]], return_stats=True)
    assert len(Z) == stats["merges"] == stats["passes"] == 0


@pytest.mark.parametrize(("method", "metric"), [("ward", "euclidean"), ("single", "euclidean"), ("complete", "cosine")])
def test_progress_ends_with_all_merges(method, metric):
    calls = []
    hiexp.linkage(normal(np.random.default_rng(0), 300, 4), method, metric, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("merge", 299, 299)
    assert all(stage in ("scan", "merge") and 0 <= done <= total for stage, done, total in calls)


def test_progress_reports_both_stages_of_a_long_run():
    calls = []
    X = normal(np.random.default_rng(0), 12_000, 64)
    hiexp.linkage(X, n_threads=1, progress=lambda *call: calls.append(call))
    for stage, total in (("scan", 12_000), ("merge", 11_999)):
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)
        assert {call[2] for call in calls if call[0] == stage} == {total}
    assert len(calls) > 2


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("stage", ["scan", "merge"])
def test_an_exception_of_progress_stops_the_run(n_threads, stage):
    calls = []

    def stop(*call):
        calls.append(call)
        if call[0] == stage:
            raise KeyError("enough")

    X = normal(np.random.default_rng(0), 12_000, 64)
    with pytest.raises(KeyError, match="enough"):
        hiexp.linkage(X, n_threads=n_threads, progress=stop)
    assert [call[0] for call in calls].count(stage) == 1
    # Nothing is left behind: the next call works.
    assert len(hiexp.linkage(X[:50])) == 49


@pytest.mark.parametrize(("method", "n"), [("ward", 60_000), ("single", 60_000)])
def test_interrupt_stops_the_run(method, n):
    # The signal comes from inside the run, so nothing has to be timed; without polling it would run for minutes.
    program = textwrap.dedent(
        f"""
        import os, signal
        import numpy as np
        import hiexp

        # A process started in the background of a script inherits an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        calls = []
        def progress(*call):
            calls.append(call)
            os.kill(os.getpid(), signal.SIGINT)

        try:
            hiexp.linkage(np.random.default_rng(0).normal(size=({n}, 32)), {method!r}, n_threads=2, progress=progress)
        except KeyboardInterrupt:
            print("stopped", len(calls), calls[0][0])
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["stopped", "1", "scan"], done.stderr


# Bad cases must stay a small number of passes over all pairs: counters, so that no test depends on the machine.
BAD = {
    "star": lambda: star(None, 400, None),
    "equidistant": lambda: np.eye(400),
    "geometric": lambda: np.column_stack([np.ones(800), 1.3 ** np.arange(800)]),
    "growing gaps": lambda: np.cumsum(1 + np.arange(2000) / 2000)[:, None] + [[0.0, 1e3]],
    "integer line": lambda: np.column_stack([np.ones(2000), np.arange(2000.0)]),
    "dense plane": lambda: normal(np.random.default_rng(0), 2500, 2),
    "dense, d = 8": lambda: normal(np.random.default_rng(0), 2500, 8),
}


@pytest.mark.parametrize(("method", "metric"), [*CENTROID_CASES, ("single", "euclidean")])
@pytest.mark.parametrize("name", BAD)
def test_bad_cases_take_few_passes(name, method, metric):
    X = BAD[name]()
    Z, stats = hiexp.linkage(X, method, metric, return_stats=True)
    assert len(Z) == len(X) - 1
    # One pass in float32, at most one or two of single rows in float32 and in float64. A cubic case has n / 3.
    assert stats["passes"] <= 8.0
    assert stats["exact_rows"] <= 2 * len(X)


def test_clustered_vectors_take_little_more_than_one_pass():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 96))[rng.integers(0, 150, 3000)] + rng.normal(size=(3000, 96))
    for method, metric, most in (("ward", "euclidean", 1.3), ("average", "cosine", 1.1), ("single", "euclidean", 2.5)):
        _, stats = hiexp.linkage(X, method, metric, return_stats=True)
        assert stats["passes"] <= most
        assert stats["exact_rows"] == 0
        # Most rescans wait above the threshold.
        half = float(np.median(hiexp.linkage(X, method, metric)[:, 2]))
        _, partial = hiexp.linkage(X, method, metric, threshold=half, return_stats=True)
        assert partial["rescans"] <= stats["rescans"] / 2


def test_ties_at_rounding_level_keep_the_tree_greedy():
    # Distances that differ in the last digits: between "equal" and "different" for a bound.
    rng = np.random.default_rng(0)
    X = np.eye(40) * (1 + 1e-14 * rng.normal(size=(40, 1)))
    for method, metric in CENTROID_CASES:
        assert_greedy(X, hiexp.linkage(X, method, metric), method, metric)
