"""Everything the CPU module does, in small: all methods and metrics, 1 and 4 threads, ties, interrupts, bad input.

Run by scripts/sanitize.sh as ``exercise.py path/to/_core.so``, with that module in place of the installed one. Results
are compared between thread counts only; what they should be is the business of the other tests.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

import numpy as np

CASES = [
    *(("ward", metric) for metric in ("euclidean", "cosine")),
    *(
        (method, metric)
        for method in ("average", "weighted", "complete", "single")
        for metric in ("euclidean", "sqeuclidean", "cosine", "manhattan")
    ),
]
METHODS = ("ward", "average", "weighted", "complete", "single")


class StopError(Exception):
    pass


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("hiexp._core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.modules["hiexp._core"] = module


def inputs(rng: np.random.Generator) -> list[np.ndarray]:
    grid = rng.integers(1, 4, size=(150, 3)).astype(float)
    return [
        rng.normal(size=(1, 3)),
        rng.normal(size=(2, 1)),
        rng.normal(size=(331, 17)),
        grid,
        grid + 1e-9 * rng.normal(size=grid.shape),
        np.vstack([np.full(60, 1 / 60), np.eye(60)[1:] * 3]),
        np.column_stack([np.ones(90), 1.3 ** np.arange(90)]).astype(np.float32),
        (rng.normal(size=(20, 24))[rng.integers(0, 20, 700)] + rng.normal(size=(700, 24))).astype(np.float32),
    ]


def clustering(rng: np.random.Generator) -> None:
    import hiexp

    for X in inputs(rng):
        for method, metric in CASES:
            one, four = (hiexp.linkage(X, method, metric, n_threads=n) for n in (1, 4))
            np.testing.assert_array_equal(one, four)
            if len(X) > 20:
                middle = float(np.median(one[:, 2]))
                partial = hiexp.linkage(X, method, metric, threshold=middle, n_threads=4)
                hiexp.cut_tree(partial, len(X), threshold=middle)
        hiexp.cut_tree(one, len(X), n_clusters=1)


def precomputed(rng: np.random.Generator) -> None:
    from hiexp import _core

    for n in (1, 2, 3, 200, 501):
        X = rng.normal(size=(n, 4))
        i, j = np.triu_indices(n, 1)
        for condensed in (np.abs(X[i] - X[j]).sum(1), np.abs(X[i] - X[j]).sum(1).round().astype(np.float32)):
            for method in METHODS:
                kind = getattr(_core.LinkageMethod, method)
                one, four = (_core.linkage_precomputed(condensed, n, kind, np.inf, t, None)[0] for t in (1, 4))
                np.testing.assert_array_equal(one, four)


def retrieval(rng: np.random.Generator) -> None:
    from hiexp.experience.index import ExactIndex

    for n, d in ((2048, 3), (5001, 100), (2500, 384)):
        X = rng.normal(size=(n, d)).astype(np.float32)
        X[n // 2 :] = X[: n - n // 2]  # duplicates
        sparse = np.where(rng.random((n, d)) < 0.1, X, 0).astype(np.float32)
        for rows in (X, sparse):
            one, four = (ExactIndex(rows, np.full(n, -np.inf), n_threads=t) for t in (1, 4))
            hidden = [[0, n - 1], []]
            for top_k, threshold in ((1, None), (7, 0.5), (n + 1, None)):
                found = one.search(rows[:2], top_k, hidden, threshold)
                assert found == four.search(rows[:2], top_k, hidden, threshold)


def interrupts(rng: np.random.Generator) -> None:
    import hiexp

    X = rng.normal(size=(1200, 24))

    def stop(*_: object) -> None:
        raise StopError

    signal.signal(signal.SIGALRM, stop)
    stopped = 0
    for method, metric in CASES:
        for seconds in (0.02, 0.15):
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                hiexp.linkage(X, method, metric, n_threads=4)
            except StopError:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    assert stopped > 0
    for bad in ([[1.0], [np.nan]], [[0.0, 0.0], [1.0, 1.0]]):
        try:
            hiexp.linkage(bad, "average", "cosine", n_threads=4)
        except ValueError:
            continue
        raise AssertionError("bad input went through")


def advantages(rng: np.random.Generator) -> None:
    import hiexp

    labels = np.sort(rng.integers(0, 40, 500))
    for dtype in (np.float32, np.float64):
        rewards = rng.normal(size=500).astype(dtype)
        for baseline in ("mean", "leave_one_out", "none"):
            for scale in ("std", "none", "batch"):
                hiexp.group_advantage(rewards, labels, baseline=baseline, scale=scale)
                hiexp.group_advantage(rewards[::3], rng.permutation(labels)[::3], baseline=baseline, scale=scale)
        hiexp.group_advantage(rewards[:1], labels[:1])


if __name__ == "__main__":
    load(sys.argv[1])
    for part in (clustering, precomputed, retrieval, interrupts, advantages):
        part(np.random.default_rng(0))
        print(f"  {part.__name__}: clean", flush=True)
