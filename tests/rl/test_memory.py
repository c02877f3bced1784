"""Out of memory: recognised, retried with fewer tokens to the same result, given up where nothing helps."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hiexp.rl.memory import TokenBudget, is_out_of_memory, peak_memory, return_freed_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def short_of_memory(update, most_rollouts, fails, after_backward=False):
    """Lets forward passes with more than ``most_rollouts`` rollouts fail; ``fails`` counts them."""
    forward, backward = update.scorer.forward, update._gradients.backward

    def failing(batch, loss=None):
        result = forward(batch, loss)
        if len(batch.indices) > most_rollouts and not after_backward:
            fails.append(batch.input_ids.numel())
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return result

    def failing_backward(loss):
        backward(loss)
        if after_backward and len(fails) < most_rollouts:
            fails.append(1)
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    update.scorer.forward = failing
    update._gradients.backward = failing_backward


@pytest.mark.parametrize("several", [{}, {"epochs": 2, "minibatches": 2, "max_grad_norm": 1.0}])
def test_a_retried_update_equals_the_unhindered_one(updated, ragged, several):
    rollouts, advantages = ragged(), np.random.default_rng(1).normal(size=7)
    _, before, expected, metrics = updated(rollouts, advantages, **several)
    fails = []
    with pytest.warns(RuntimeWarning, match=r"step 1, \w+: out of memory \(OutOfMemoryError: CUDA out of memory"):
        update, _, weights, again = updated(
            rollouts, advantages, prepare=lambda update: short_of_memory(update, 2, fails), **several
        )
    assert fails
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=1e-4)
    assert again.pop("oom_retries") == len(fails) > metrics.pop("oom_retries") == 0
    assert again == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    # The next step starts with what fitted, and so does a run that continues.
    assert update.budget.tokens < max(fails)
    assert update.state_dict()["tokens_per_microbatch"] == update.budget.tokens


def test_gradients_of_the_failed_attempt_are_dropped(updated, ragged):
    """Memory runs out after the first backward pass has added its gradient."""
    rollouts, advantages = ragged(), np.random.default_rng(1).normal(size=7)
    _, _, expected, metrics = updated(rollouts, advantages, tokens_per_microbatch=45)
    fails = []
    with pytest.warns(RuntimeWarning, match="not enough memory"):
        _, _, weights, again = updated(
            rollouts, advantages, tokens_per_microbatch=45,
            prepare=lambda update: short_of_memory(update, 1, fails, after_backward=True),
        )  # fmt: skip
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=1e-4)
    assert again["trained_tokens"] == metrics["trained_tokens"]
    assert again["oom_retries"] == 1


def test_a_rollout_that_does_not_fit_alone_ends_the_run(updated, ragged):
    kept = []

    def prepare(update):
        kept.append(update.scorer.model)
        short_of_memory(update, 0, [])

    with (
        pytest.warns(RuntimeWarning, match="out of memory"),
        pytest.raises(MemoryError, match=r"one rollout of \d+ tokens per micro-batch .*max_total_tokens"),
    ):
        updated(ragged(), np.ones(7), kl_coef=0.0, prepare=prepare)
    assert all(weight.grad is None for weight in kept[0].parameters())


def test_other_errors_pass_through():
    def work(batches):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        TokenBudget(8).run(lambda tokens: [], work, lambda: None, "step 1")


def test_peak_memory_is_that_of_the_process():
    found = peak_memory("cpu")
    assert found["peak_cuda_mb"] is None
    with open("/proc/self/status") as status:
        (peak,) = [int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")]
    assert found["peak_rss_mb"] == pytest.approx(peak, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library is not glibc")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    # Blocks below the smallest size that glibc maps on its own; the last one keeps the heap from shrinking by itself.
    blocks = [torch.ones(16_000) for _ in range(2000)]  # 128 MB
    last = blocks[-1]
    del blocks
    full = resident()
    return_freed_memory()
    assert full - resident() > 60e6
    assert last.sum() == 16_000
