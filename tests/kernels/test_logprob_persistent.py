"""The persistent Triton kernel against the float64 reference; GPU or interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'hiexp[gpu]'")

from hiexp import token_logprobs
from hiexp.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_interpreter.py")


@pytest.fixture
def small_splits(monkeypatch):
    """Splits of two tiles (64 columns in the interpreter), groups of two row blocks: every loop has several rounds."""
    from hiexp.kernels import logprob_persistent

    if DEVICE == "cpu":
        monkeypatch.setattr(logprob_persistent, "SPLIT_COLUMNS", 64)
        monkeypatch.setattr(logprob_persistent, "GROUP", 2)
    return logprob_persistent


def make(rows, width, vocabulary, dtype):
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype)
    edges = torch.tensor([0, vocabulary - 1, vocabulary // 2, 63 % vocabulary, 64 % vocabulary], device=DEVICE)
    return hidden, weight, edges[torch.arange(rows, device=DEVICE) % 5]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (5, 17, 33), (16, 16, 64), (37, 24, 150)])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias_temperature_entropy"])
def test_equals_the_reference(small_splits, assert_close, dtype, rows, width, vocabulary, extras):
    hidden, weight, targets = make(rows, width, vocabulary, dtype)
    bias = torch.randn(vocabulary, device=DEVICE) if extras else None
    temperature = torch.linspace(0.5, 1.5, rows, device=DEVICE) if extras else None
    inverse = None if temperature is None else temperature.reciprocal()
    ours = small_splits.forward(hidden, weight, targets, bias, inverse, entropy=extras)
    truth = reference.token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature)
    for name, mine, other in zip(("logprobs", "entropy", "lse"), ours, truth, strict=True):
        if name != "entropy" or extras:
            assert mine.dtype == torch.float32
            assert_close(mine, other, torch.float32, budget=3e-5)


@runs_kernels
def test_a_row_does_not_depend_on_its_neighbours_or_their_number(small_splits):
    hidden, weight, targets = make(50, 20, 150, torch.float32)
    everything = small_splits.forward(hidden, weight, targets, None, None, entropy=True)
    for rows in (slice(0, 1), slice(17, 50)):
        part = small_splits.forward(hidden[rows], weight, targets[rows].contiguous(), None, None, entropy=True)
        for mine, other in zip(part, everything, strict=True):
            assert torch.equal(mine, other[rows])


@runs_kernels
def test_shifted_forbidden_and_spoilt_rows(small_splits, assert_close):
    hidden, weight, targets = make(20, 8, 100, torch.float32)
    targets = torch.full_like(targets, 99)
    still = small_splits.forward(hidden, weight, targets, None, None, entropy=True)
    shift = torch.full((100,), -30.0, device=DEVICE)
    moved = small_splits.forward(hidden, weight, targets, shift, None, entropy=True)
    assert_close(moved[0], still[0], torch.float32, budget=3e-5)
    shift[:70] = -torch.inf  # a whole split is forbidden
    forbidden = small_splits.forward(hidden, weight, targets, shift, None, entropy=True)
    truth = reference.token_logprobs(hidden, weight[70:], targets - 70)
    assert_close(forbidden[0], truth[0], torch.float32, budget=3e-5)
    assert_close(forbidden[1], truth[1], torch.float32, budget=3e-5)
    hidden[3, 2], hidden[5, 0] = torch.nan, torch.inf
    spoilt = token_logprobs(hidden, weight, targets, impl="persistent")
    assert spoilt.finite.logical_not().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the descriptors are used wherever they can be")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensor_descriptors_equal_pointers(small_splits, monkeypatch, dtype):
    hidden, weight, targets = make(37, 24, 150, dtype)
    pointers = small_splits.forward(hidden, weight, targets, None, None, entropy=True)
    monkeypatch.setattr(small_splits, "can_use_tma", lambda *_: True)
    descriptors = small_splits.forward(hidden, weight, targets, None, None, entropy=True)
    for mine, other in zip(descriptors, pointers, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.skipif(not INTERPRETED, reason="host memory")
def test_offsets_beyond_31_bits(small_splits, tmp_path):
    """Hidden rows 2^30 + 16 numbers apart in a sparse file: the third begins beyond 2^31."""
    stride = 2**30 + 16
    memory = np.memmap(tmp_path / "hidden", dtype=np.float32, mode="w+", shape=(2 * stride + 24,))
    far = torch.from_numpy(memory).as_strided((3, 24), (stride, 1))
    hidden, weight, targets = make(3, 24, 150, torch.float32)
    far.copy_(hidden)
    results = [small_splits.forward(x, weight, targets, None, None, entropy=False) for x in (far, hidden)]
    assert torch.equal(results[0][0], results[1][0])


@runs_kernels
@pytest.mark.parametrize("rows", [0, 9])
def test_end_to_end_with_gradients(small_splits, assert_close, rows):
    hidden, weight, targets = make(rows, 6, 99, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for impl in ("persistent", "reference"):
        out = token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True, impl=impl)
        total = (out.logprobs * 1.3 + out.entropy * 0.7 + out.lse * 0.2).sum()
        results.append([out.logprobs, out.entropy, out.lse, *torch.autograd.grad(total, [hidden, weight])])
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, torch.float32, budget=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 200, 129])
def test_error_budget_on_the_gpu(dtype, width):
    hidden = torch.randn(300, width, device="cuda", dtype=dtype)
    weight = (torch.randn(50_257, width, device="cuda") * 0.1).to(dtype)
    targets = torch.randint(0, 50_257, (300,), device="cuda")
    truth = token_logprobs(hidden, weight, targets, impl="reference", entropy=True)
    ours = token_logprobs(hidden, weight, targets, entropy=True, impl="persistent")
    assert float((ours.logprobs - truth.logprobs).abs().max()) <= 1e-3  # nats, the project's stated bound
    assert float((ours.entropy - truth.entropy).abs().max()) <= 1e-3


@pytest.mark.gpu
def test_lengths_and_temperatures_compile_nothing_new():
    from hiexp.kernels import logprob_persistent

    def compiled():
        return sum(len(cache[0]) for cache in logprob_persistent.forward_kernel.device_caches.values())

    weight = torch.randn(1000, 64, device="cuda")
    counts = []
    for step, rows in enumerate((1, 2, 16, 33, 1000)):
        hidden, targets = torch.randn(rows, 64, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
        token_logprobs(hidden, weight, targets, temperature=0.5 + step, impl="persistent")
        counts.append(compiled())
    assert counts == counts[:1] * 5
