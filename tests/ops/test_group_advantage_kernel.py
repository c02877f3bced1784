"""The CUDA kernel's inline functions on CPU threads: any order of rows gives the bits of the library's own result."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hiexp import group_advantage

ROOT = Path(__file__).resolve().parents[2]
BASELINES, SCALES, SINGLETONS = ("mean", "leave_one_out", "none"), ("std", "none", "batch"), ("zero", "raw")
LABEL_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
LONGEST_RUN = 128  # as in group_advantage_cuda.cu


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs a C++ compiler and the sources")
    target = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = Path(__file__).with_name("group_advantage_emulation.cpp")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True, timeout=300)
    return ctypes.CDLL(str(target))


def emulate(library, rewards, labels, order, *, threads=3, only_table=False, longest_run=LONGEST_RUN, **options):
    """(whether the run path sufficed, advantages, zero_variance, mean, std, counts) as the kernel would write them."""
    chosen = {"baseline": "mean", "scale": "std", "singleton": "zero", "ddof": 1, "eps": 1e-6, **options}
    rows = len(rewards)
    outputs = [np.empty(rows, kind) for kind in (np.float32, np.bool_, np.float32, np.float32, np.int32)]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (rewards, labels, order, *outputs)]
    sufficed = library.emulate(
        pointers[0], pointers[1], LABEL_TYPES.index(str(labels.dtype)), ctypes.c_int64(rows), pointers[2], threads,
        ctypes.c_int64(longest_run), int(only_table), BASELINES.index(chosen["baseline"]),
        SCALES.index(chosen["scale"]), SINGLETONS.index(chosen["singleton"]), chosen["ddof"],
        ctypes.c_double(chosen["eps"]), *pointers[3:],
    )  # fmt: skip
    return bool(sufficed), outputs


def assert_same_bits(outputs, labels, result):
    advantages, zero_variance, mean, std, counts = outputs
    np.testing.assert_array_equal(advantages, result.advantages)
    np.testing.assert_array_equal(zero_variance, result.zero_variance)
    first = np.flatnonzero(counts >= 0)
    assert len(first) == len(np.unique(labels))
    first = first[labels[first].argsort()]
    np.testing.assert_array_equal(labels[first], result.groups)
    for actual, expected in ((mean, result.mean), (std, result.std), (counts, result.counts)):
        np.testing.assert_array_equal(actual[first], expected)


def make_batch(seed, rows=3000, kind="int64"):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 120, rows) if kind.startswith("u") else rng.integers(-60, 60, rows)
    rewards = (rng.normal(size=rows) + rng.choice([0.0, 1e6, -3e4], size=rows)).astype(np.float32)
    rewards[rng.integers(0, rows, 40)] = rng.choice([np.nan, np.inf, -np.inf], 40)
    rewards[labels == labels[0]] = 0.1  # one group without variance
    return rewards, labels.astype(kind), rng


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"baseline": "leave_one_out", "scale": "none", "ddof": 0}])
def test_scattered_labels_in_any_order_of_rows(library, seed, options):
    rewards, labels, rng = make_batch(seed)
    result = group_advantage(rewards, labels, nan="zero", **options)
    for threads in (1, 4):
        sufficed, outputs = emulate(library, rewards, labels, rng.permutation(len(rewards)), threads=threads, **options)
        assert not sufficed
        assert_same_bits(outputs, labels, result)


@pytest.mark.parametrize("kind", LABEL_TYPES)
def test_runs_equal_the_table(library, kind):
    rewards, labels, rng = make_batch(7, kind=kind)
    labels = np.sort(labels)
    result = group_advantage(rewards, labels, nan="zero", singleton="raw")
    order = rng.permutation(len(rewards))
    sufficed, outputs = emulate(library, rewards, labels, order, singleton="raw")
    assert sufficed
    assert_same_bits(outputs, labels, result)
    sufficed, outputs = emulate(library, rewards, labels, order, singleton="raw", only_table=True)
    assert not sufficed
    assert_same_bits(outputs, labels, result)


def test_what_ends_the_run_path(library):
    rewards = np.arange(300, dtype=np.float32)
    order = np.arange(300)
    for labels, sufficed in (
        (np.zeros(300, dtype=np.int64), False),  # a run too long for one thread
        (order // LONGEST_RUN, True),
        (order // (LONGEST_RUN + 1), False),
        (-(order // 8), False),  # contiguous, but not ascending: whether a label comes back is not known
        (order // 8 % 4, False),  # labels come back
        (order, True),  # singletons
    ):
        took, outputs = emulate(library, rewards, labels, order)
        assert took == sufficed
        assert_same_bits(outputs, labels, group_advantage(rewards, labels))


def test_labels_that_collide_in_the_table(library):
    # 64 slots at least: 32 labels that are equal in their low 40 bits must still be told apart.
    labels = np.repeat(np.arange(32, dtype=np.int64) << 40, 2)[np.random.default_rng(3).permutation(64)]
    rewards = np.arange(64, dtype=np.float32)
    _, outputs = emulate(library, rewards, labels, np.arange(64), only_table=True)
    assert_same_bits(outputs, labels, group_advantage(rewards, labels))
