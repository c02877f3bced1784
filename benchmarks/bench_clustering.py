"""linkage against scikit-learn, SciPy and fastcluster. Run: pytest benchmarks/bench_clustering.py

Full dendrograms of clustered float32 unit rows; providers and data are those of ``hiexp bench``, which makes the
interleaved table with peak memory. Work: one pass over all pairs of rows is n (n - 1) / 2 products of length d, that is
n (n - 1) d floating-point operations; the figure is this formula over the measured time, the same for every provider
whatever it really does.
"""

from __future__ import annotations

import numpy as np
import pytest

import hiexp
from hiexp import bench

D = 384


@pytest.mark.parametrize("shape", [1000, 3000], ids="n{}".format)
@pytest.mark.parametrize(("method", "metric"), bench.CASES, ids=["-".join(case) for case in bench.CASES])
@pytest.mark.parametrize("provider", bench.available())
def test_linkage(benchmark, provider, method, metric, shape):
    X = bench.make_rows(shape, D)
    run = bench.available()[provider]
    benchmark.pedantic(run, args=(X, method, metric), rounds=3, warmup_rounds=1, iterations=1)
    benchmark.extra_info["GFLOP/s"] = shape * (shape - 1) * D / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("shape", [3000], ids="n{}".format)
@pytest.mark.parametrize("provider", ["full", "below_half_of_the_merges"])
@pytest.mark.parametrize(("method", "metric"), bench.CASES, ids=["-".join(case) for case in bench.CASES])
def test_threshold(benchmark, provider, method, metric, shape):
    X = bench.make_rows(shape, D)
    heights = hiexp.linkage(X, method, metric)[:, 2]
    threshold = None if provider == "full" else float(np.median(heights))
    run = hiexp.linkage
    Z = benchmark.pedantic(run, args=(X, method, metric), kwargs={"threshold": threshold}, rounds=3, iterations=1)
    assert len(Z) == (len(heights) if threshold is None else np.searchsorted(heights, threshold))


# With a GPU: rows are on the device already, Z stays there. Work as above: 2 n (n - 1) / 2 d floating-point operations.
# Peers: none has ward or average on a GPU, so torch computes the distances there and SciPy or fastcluster go on; cuML
# has single linkage, which hiexp runs on the CPU, and stands here for scale.

GPU_CASES = (("ward", "euclidean"), ("average", "cosine"))


def hiexp_cuda(X, method, metric):
    return hiexp.linkage(X, method, metric)


def torch_distances(X, method, metric):
    """Distances on the GPU in blocks of rows, the condensed float64 triangle on the CPU."""
    import torch

    rows = torch.nn.functional.normalize(X) if metric == "cosine" else X
    triangle = []
    for first in range(0, len(rows), 1024):
        block = rows[first : first + 1024]
        if metric == "cosine":
            distances = 1.0 - block @ rows.T
        else:
            distances = torch.cdist(block, rows)
        keep = (
            torch.arange(len(rows), device=X.device) > torch.arange(first, first + len(block), device=X.device)[:, None]
        )
        triangle.append(distances[keep].cpu())
    return torch.cat(triangle).double().numpy()


def cdist_scipy(X, method, metric):
    from scipy.cluster.hierarchy import linkage

    return linkage(np.maximum(torch_distances(X, method, metric), 0.0), method)


def cdist_fastcluster(X, method, metric):
    from fastcluster import linkage

    return linkage(np.maximum(torch_distances(X, method, metric), 0.0), method, preserve_input=False)


def cuml_single(X, method, metric):
    from cuml.cluster import AgglomerativeClustering

    return AgglomerativeClustering(n_clusters=2, linkage="single", metric=metric).fit(X)


GPU_PEERS = {
    "torch.cdist + scipy": (cdist_scipy, "scipy"),
    "torch.cdist + fastcluster": (cdist_fastcluster, "fastcluster"),
    "cuml single": (cuml_single, "cuml"),
}


def gpu_rows(n, d):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator("cuda").manual_seed(0)
    centres = torch.randn(max(1, n // 20), d, device="cuda", generator=generator)
    rows = centres[torch.randint(len(centres), (n,), device="cuda", generator=generator)]
    rows += torch.randn(n, d, device="cuda", generator=generator)
    return torch.nn.functional.normalize(rows)


def measure_on_gpu(benchmark, run, X, method, metric, rounds):
    import torch

    def timed():
        run(X, method, metric)
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1, iterations=1)
    n, d = X.shape
    benchmark.extra_info["TFLOP/s"] = n * (n - 1) * d / benchmark.stats.stats.median / 1e12
    benchmark.extra_info["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(10_000, 384), (10_000, 768), (100_000, 768)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("method", "metric"), GPU_CASES, ids=["-".join(case) for case in GPU_CASES])
def test_linkage_cuda(benchmark, method, metric, shape):
    measure_on_gpu(benchmark, hiexp_cuda, gpu_rows(*shape), method, metric, rounds=5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1_000_000, 768)], ids="{0[0]}x{0[1]}".format)
def test_a_million_rows_cuda(benchmark, shape):
    measure_on_gpu(benchmark, hiexp_cuda, gpu_rows(*shape), "ward", "euclidean", rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(10_000, 384), (30_000, 384)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("method", "metric"), GPU_CASES, ids=["-".join(case) for case in GPU_CASES])
@pytest.mark.parametrize("provider", GPU_PEERS)
def test_peers_cuda(benchmark, provider, method, metric, shape):
    run, package = GPU_PEERS[provider]
    pytest.importorskip(package)
    measure_on_gpu(benchmark, run, gpu_rows(*shape), method, metric, rounds=1)
