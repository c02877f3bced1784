"""hiexp.linkage on a GPU. Without one: the same steps emulated on the host, the maps of the tensor-core tile, and the
errors. With one (marked gpu): the device against the CPU.

Without ties both backends must give the same tree: bit by bit from rounds, up to rounding from the tail, which updates
costs by Lance-Williams instead of from centroids. Where distances tie either takes its own choice, so there the oracle
decides: every merge joins the closest pair there is.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiexp
from hiexp import _core
from hiexp.ops import reference_clustering as reference
from hiexp.ops._clustering_cuda import CUDA_LINKAGES, wants_cuda

CASES = [(method, metric) for method, metrics in CUDA_LINKAGES.items() for metric in metrics]
RTOL = 1e-13
TAIL_RTOL = 1e-12
TAIL = 2048  # kTailClusters in clusters.h
TAILS = (0, 12, 100, TAIL)  # never, the last few, a part, all of the small inputs here


def emulate(X, method="ward", metric="euclidean", threshold=np.inf, progress=None, tail=TAIL):
    """Z and stats from the device's steps run on the host; at most `tail` clusters are left to the chain."""
    rows = np.ascontiguousarray(X)
    rows = rows.view(np.uint16) if rows.dtype == np.float16 else rows
    kind = _core.LinkageMethod.__members__[method], _core.LinkageMetric.__members__[metric]
    return _core.linkage_device_logic(rows, *kind, float(threshold), tail, progress)


def random_rows(rng, n, d):
    return rng.normal(size=(n, d))


def blobs(rng, n, d):
    return 20 * rng.normal(size=(4, d))[rng.integers(0, 4, n)] + rng.normal(size=(n, d))


def offset(rng, n, d):
    return rng.normal(size=(n, d)) + 1e6


def duplicated(rng, n, d):
    return rng.normal(size=(max(1, n // 3), d))[rng.integers(0, max(1, n // 3), n)]


def tiny(rng, n, d):
    return rng.normal(size=(n, d)) * 1e-140  # squared distances stay normal numbers


def chain(rng, n, d):
    # On a line, gaps growing: every cluster but one points to its left neighbour.
    return np.column_stack([np.ones(n), 1.02 ** np.arange(n)])


def close_pairs(rng, n, d):
    # Far closer than half precision can tell apart.
    return np.repeat(rng.normal(size=((n + 1) // 2, d)), 2, axis=0)[:n] + 1e-7 * rng.normal(size=(n, d))


def grid(rng, n, d):
    return rng.integers(1, 4, size=(n, d)).astype(float)


def equidistant(rng, n, d):
    return np.eye(n)


def star(rng, n, d):
    return np.vstack([np.full(n, 1.0 / n), np.eye(n)[1:] * 3])


TIE_FREE = (random_rows, blobs, offset, duplicated, tiny, chain, close_pairs)
TIED = (grid, equidistant, star)


def assert_greedy(X, Z, method, metric):
    excess, error = reference.greedy_excess(X, Z, method, metric)
    scale = max(1.0, Z[:, 2].max(initial=0.0)) if metric == "cosine" else Z[:, 2].max(initial=0.0)
    np.testing.assert_allclose(excess / (scale or 1.0), 0.0, rtol=0.0, atol=RTOL)
    np.testing.assert_allclose(error / (scale or 1.0), 0.0, rtol=0.0, atol=RTOL)


def assert_same_tree(ours, theirs, exact=False):
    """The same merges in the same order, so the same partitions at every height; heights equal up to rounding."""
    if exact:
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours[:, [0, 1, 3]], theirs[:, [0, 1, 3]])
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], rtol=TAIL_RTOL, atol=0.0)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", TIE_FREE)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (17, 4), (300, 21)])
@pytest.mark.parametrize("tail", TAILS)
def test_device_steps_give_the_tree_of_the_cpu(method, metric, kind, n, d, tail):
    if metric == "cosine" and (d == 1 or kind is chain):
        pytest.skip("angles tie: on a line, and at the far end of the chain in the last place")
    X = kind(np.random.default_rng(n), n, d)
    Z, stats = emulate(X, method, metric, tail=tail)
    assert_same_tree(Z, hiexp.linkage(X, method, metric), exact=tail == 0)
    assert stats["merges"] == n - 1


@pytest.mark.parametrize(("method", "metric"), CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tail=st.sampled_from((0, 10, 20, TAIL)),
    kind=st.sampled_from((*TIE_FREE, *TIED)),
    n=st.integers(1, 40),
    d=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_merge_of_the_device_steps_is_a_global_minimum(method, metric, tail, kind, n, d, seed):
    X = kind(np.random.default_rng(seed), n, d)
    assert_greedy(X, emulate(X, method, metric, tail=tail)[0], method, metric)


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("tail", [0, 30, TAIL])
def test_ties_at_some_size(method, metric, kind, tail):
    X = kind(np.random.default_rng(2), 70, 6)
    Z, _ = emulate(X, method, metric, tail=tail)
    assert Z.shape == (69, 4)
    assert_greedy(X, Z, method, metric)


def threshold_below(Z, at, tail):
    """One that row `at` does not reach: its height, or with a tail one between: right at a height, rounding decides."""
    if tail == 0:
        return Z[at, 2]
    return (Z[at - 1, 2] + Z[at, 2]) / 2 if at else Z[0, 2] / 2


@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("tail", TAILS)
def test_device_steps_stop_at_a_threshold(method, metric, fraction, tail):
    X = blobs(np.random.default_rng(5), 400, 12)
    full = hiexp.linkage(X, method, metric)
    at = int(fraction * len(full))
    partial, stats = emulate(X, method, metric, threshold_below(full, at, tail), tail=tail)
    assert_same_tree(partial, full[:at], exact=tail == 0)
    if fraction == 0.0:
        assert stats["rescans"] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_device_steps_take_other_elements(dtype):
    X = random_rows(np.random.default_rng(1), 200, 9).astype(dtype)
    np.testing.assert_array_equal(emulate(X, tail=0)[0], hiexp.linkage(X))


def test_device_steps_recompute_what_half_precision_cannot_rank():
    X = close_pairs(np.random.default_rng(0), 200, 8)
    assert emulate(X, tail=0)[1]["exact_rows"] == 0  # the partner alone is that close: one candidate decides
    tight = 1e-6 * random_rows(np.random.default_rng(0), 100, 8)
    X = np.vstack([tight, 1.0 + tight])
    Z, stats = emulate(X, tail=0)
    np.testing.assert_array_equal(Z, hiexp.linkage(X))
    assert stats["exact_rows"] > 100


def test_the_chain_replaces_rounds():
    X = random_rows(np.random.default_rng(6), 300, 8)
    rounds = [emulate(X, tail=tail)[1]["rounds"] for tail in (0, 40, 300)]
    assert rounds[0] > rounds[1] > rounds[2] == 0


def test_device_steps_report_progress_and_stop():
    calls = []
    emulate(random_rows(np.random.default_rng(0), 50, 4), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("merge", 49, 49)

    def stop(stage, done, total):
        raise KeyError(stage)

    with pytest.raises(KeyError):
        emulate(random_rows(np.random.default_rng(0), 50, 4), progress=stop)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.array([[1.0, 2.0], [3.0, np.nan]]), "row 1, column 1"),
        (np.array([[np.inf, 2.0], [3.0, 1.0]]), "row 0, column 0"),
        (np.array([[1.0, 2.0], [0.0, 0.0]]), "zeros in row 1"),
    ],
)
def test_device_steps_refuse_bad_values_as_the_cpu_does(X, message):
    with pytest.raises(ValueError, match=message) as ours:
        emulate(X, "average", "cosine")
    with pytest.raises(ValueError, match=message) as theirs:
        hiexp.linkage(X, "average", "cosine")
    assert str(ours.value) == str(theirs.value)


def test_fragment_maps_of_the_tensor_core_tile():
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-50, 50, size=(16, 16)).astype(np.float32) for _ in range(2))
    np.testing.assert_array_equal(_core.emulated_tile(a, b), a @ b.T)


def test_who_asks_for_the_gpu():
    X = np.ones((2, 2))
    assert not wants_cuda(X, None)
    assert not wants_cuda(X, "cpu")
    assert not wants_cuda([[1.0]], None)
    assert wants_cuda(X, "cuda")
    assert wants_cuda(X, "cuda:1")


def _usable():
    try:
        from hiexp import _cuda
    except ImportError:
        return False
    return _cuda.device_count() > 0


@pytest.mark.skipif(_usable(), reason="for machines without a GPU")
def test_without_a_gpu_the_error_says_so():
    with pytest.raises(ValueError, match=r"device: expected None or 'cpu' \(.*\), got 'cuda'"):
        hiexp.linkage(np.ones((3, 2)), device="cuda")


@pytest.mark.parametrize("device", ["tpu", "gpu", "cudax", 3])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=f"device: .*{device}"):
        hiexp.linkage(np.ones((3, 2)), device=device)


# With a GPU from here on.


def on_gpu(X, *args, **options):
    import torch

    Z = hiexp.linkage(torch.from_numpy(np.ascontiguousarray(X)).cuda(), *args, **options)
    assert Z.is_cuda
    assert str(Z.dtype) == "torch.float64"
    return Z.cpu().numpy()


@pytest.fixture(params=[0, TAIL])
def tail(request, monkeypatch):
    """Every run on the GPU leaves at most that many clusters to the chain."""
    from hiexp import _cuda

    monkeypatch.setattr(_cuda, "linkage", functools.partial(_cuda.linkage, tail=request.param))
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", TIE_FREE)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (17, 4), (129, 33), (700, 21)])
def test_gpu_tree_equals_the_cpu_tree(method, metric, kind, n, d, tail):
    if metric == "cosine" and (d == 1 or kind is chain):
        pytest.skip("angles tie: on a line, and at the far end of the chain in the last place")
    X = kind(np.random.default_rng(n), n, d)
    assert_same_tree(on_gpu(X, method, metric), hiexp.linkage(X, method, metric), exact=tail == 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize(("n", "d"), [(4097, 384), (3000, 1000), (10001, 64)])
def test_gpu_tree_equals_the_cpu_tree_at_size(method, metric, n, d, tail):
    X = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    assert_same_tree(on_gpu(X, method, metric), hiexp.linkage(X, method, metric), exact=tail == 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("kind", TIED)
def test_gpu_merges_are_global_minima_where_distances_tie(method, metric, kind, tail):
    X = kind(np.random.default_rng(3), 60, 5)
    assert_greedy(X, on_gpu(X, method, metric), method, metric)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [blobs, grid, star])
def test_gpu_runs_are_repeatable(kind, tail):
    X = kind(np.random.default_rng(4), 500, 12)
    np.testing.assert_array_equal(on_gpu(X), on_gpu(X))


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "metric"), CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.95])
def test_gpu_stops_at_a_threshold(method, metric, fraction, tail):
    X = blobs(np.random.default_rng(5), 2000, 24)
    full = hiexp.linkage(X, method, metric)
    at = int(fraction * len(full))
    partial = on_gpu(X, method, metric, threshold=threshold_below(full, at, tail))
    assert_same_tree(partial, full[:at], exact=tail == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_gpu_elements_and_strides(dtype):
    import torch

    X = (torch.randn(300, 40) * 8).to(getattr(torch, dtype))[::2, 1:]
    expected = hiexp.linkage(X, "ward")
    assert_same_tree(hiexp.linkage(X.cuda(), "ward").cpu().numpy(), expected.numpy())
    assert_same_tree(hiexp.linkage(X, "ward", device="cuda").numpy(), expected.numpy())  # back to where X lives


@pytest.mark.gpu
def test_gpu_numpy_in_numpy_out():
    X = random_rows(np.random.default_rng(0), 100, 5)
    Z, stats = hiexp.linkage(X, device="cuda", return_stats=True)
    assert isinstance(Z, np.ndarray)
    assert_same_tree(Z, hiexp.linkage(X))
    assert stats["merges"] == 99


@pytest.mark.gpu
def test_gpu_cupy_arrays_stay_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    X = random_rows(np.random.default_rng(0), 100, 5)
    Z = hiexp.linkage(cupy.asarray(X))
    assert isinstance(Z, cupy.ndarray)
    assert_same_tree(Z.get(), hiexp.linkage(X))


@pytest.mark.gpu
def test_gpu_uses_the_callers_stream():
    import torch

    X = torch.randn(3000, 64)
    expected = hiexp.linkage(X)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Work queued on the same stream just before: a run on another stream would read zeros.
        late = torch.zeros_like(X, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(X)
        Z = hiexp.linkage(late)
    assert_same_tree(Z.cpu().numpy(), expected.numpy())


@pytest.mark.gpu
def test_gpu_device_need_not_be_the_current_one():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    X = torch.randn(200, 8)
    Z = hiexp.linkage(X.to("cuda:1"))
    assert Z.device.index == 1
    assert_same_tree(Z.cpu().numpy(), hiexp.linkage(X).numpy())
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_gpu_that_is_not_there():
    import torch

    with pytest.raises(ValueError, match="device: expected one of cuda:0"):
        hiexp.linkage(np.ones((3, 2)), device=f"cuda:{torch.cuda.device_count()}")


@pytest.mark.gpu
def test_gpu_too_little_memory_is_refused_before_work():
    import torch

    free, _ = torch.cuda.mem_get_info()
    hold = torch.empty(int(free * 0.9), dtype=torch.uint8, device="cuda")
    with pytest.raises(MemoryError, match=r"X: clustering \d+ rows of 4096 coordinates needs (\d+) bytes") as error:
        hiexp.linkage(torch.zeros(int(free * 0.2) // (4096 * 10), 4096, dtype=torch.float16, device="cuda"))
    needed, left = map(int, re.findall(r"needs (\d+) .*?, (\d+) ", str(error.value))[0])
    assert needed > left
    del hold


@pytest.mark.gpu
def test_gpu_refuses_linkages_it_has_not():
    with pytest.raises(ValueError, match="method, metric: expected on a GPU one of ward"):
        hiexp.linkage(np.ones((3, 2)), "complete", device="cuda")


@pytest.mark.gpu
def test_gpu_refuses_bad_values_and_shapes():
    import torch

    bad = torch.ones(5, 3, device="cuda")
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="row 3, column 2"):
        hiexp.linkage(bad)
    with pytest.raises(ValueError, match="zeros in row 0"):
        hiexp.linkage(torch.zeros(2, 2, device="cuda"), "average", "cosine")
    with pytest.raises(ValueError, match="expected shape"):
        hiexp.linkage(torch.zeros(4, device="cuda"))
    with pytest.raises(TypeError, match="real numbers"):
        hiexp.linkage(torch.zeros(2, 2, dtype=torch.complex64, device="cuda"))


@pytest.mark.gpu
def test_gpu_progress_may_stop_a_run():
    import torch

    def stop(stage, done, total):
        raise KeyError(stage)

    X = torch.randn(500, 16, device="cuda")
    with pytest.raises(KeyError):
        hiexp.linkage(X, progress=stop)
    # And the next one is none the worse.
    assert_same_tree(hiexp.linkage(X).cpu().numpy(), hiexp.linkage(X.cpu()).numpy())


@pytest.mark.gpu
def test_gpu_labels_follow_the_tree():
    import torch

    X = torch.randn(64, 5)
    labels = hiexp.cut_tree(hiexp.linkage(X.cuda()), 64, n_clusters=7)
    assert labels.is_cuda
    assert torch.equal(labels.cpu(), hiexp.cut_tree(hiexp.linkage(X), 64, n_clusters=7))
