"""The Triton kernels of ``paired_logprobs`` against their torch twin and the reference; GPU or interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'hiexp[gpu]'")

from hiexp.ops import _logprob_pair, _logprob_pair_epilogue
from hiexp.ops.paired_logprobs import paired_logprobs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_interpreter.py")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def tiles(rows, columns, dtype, extras):
    target = torch.tensor([-5, 0, columns - 1, columns, columns // 2])[torch.arange(rows) % 5].to(DEVICE)
    bias = random(columns, dtype=dtype) if extras else None
    inverse = random(rows, dtype=dtype).abs() + 0.5 if extras else None
    return 3 * random(rows, columns, dtype=dtype), 2 * random(rows, columns, dtype=dtype), bias, inverse, target


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (2, 2049)])
@pytest.mark.parametrize("extras", [False, True])
def test_forward_equals_its_twin(dtype, rows, columns, extras, assert_close):
    from hiexp.kernels import logprob_pair

    z_a, z_b, bias, inverse, target = tiles(rows, columns, dtype, extras)
    states = []
    for module in (logprob_pair, _logprob_pair_epilogue):
        state = torch.zeros(7, rows, dtype=dtype, device=DEVICE)
        state[0] = state[3] = torch.finfo(dtype).min
        for shift in (0, 2, -3):  # three tiles into one state; the maxima rise and do not rise, on one side at a time
            module.forward_tile(z_a + shift, z_b - 2 * shift, bias, inverse, target, state)
        states.append(state)
    for mine, other in zip(*states, strict=True):
        assert_close(mine, other, dtype, budget=1e-5 * float(other.abs().max()) if dtype == torch.float32 else 0.0)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (2, 2049)])
@pytest.mark.parametrize("extras", [False, True])
def test_backward_equals_its_twin(dtype, rows, columns, extras, assert_close):
    from hiexp.kernels import logprob_pair

    z_a, z_b, bias, inverse, target = tiles(rows, columns, dtype, extras)
    rows_of = [random(rows, dtype=dtype) for _ in range(5)]
    upstream = _logprob_pair.PairUpstream(z_a.logsumexp(1) + 3, z_b.logsumexp(1) + 3, *rows_of)
    ours, theirs = [z_a.clone(), z_b.clone()], [z_a.clone(), z_b.clone()]
    logprob_pair.backward_tile(*ours, bias, inverse, target, upstream)
    _logprob_pair_epilogue.backward_tile(*theirs, bias, inverse, target, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, dtype, budget=1e-5 * float(other.abs().max()) if dtype == torch.float32 else 0.0)


@runs_kernels
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_end_to_end(monkeypatch, assert_close, rows):
    """Tiles of 4 rows and 40 columns over V = 99, a forbidden first tile; forward and backward."""
    monkeypatch.setattr(_logprob_pair, "tile_shape", lambda device: (4, 40))
    monkeypatch.setattr("hiexp.ops._logprob_tiles.tile_shape", lambda device: (4, 40))
    inputs = [random(rows, 6, dtype=torch.float32).requires_grad_() for _ in range(2)]
    inputs.append(random(99, 6, dtype=torch.float32).requires_grad_())
    bias = random(99, dtype=torch.float32)
    bias[:40] = -torch.inf
    targets = torch.tensor([40, 41, 42, 79, 80, 98, 55, 66, 77], device=DEVICE)[:rows]
    temperature = torch.linspace(0.5, 1.5, rows, device=DEVICE)
    results = []
    for impl in ("triton", "reference"):
        out = paired_logprobs(*inputs, targets, bias=bias, temperature=temperature, impl=impl)
        values = [out.logprobs_a, out.logprobs_b, out.kl, out.lse_a, out.lse_b]
        total = sum((factor * x).sum() for factor, x in zip((1.3, 0.7, 0.9, 0.2, -0.4), values, strict=True))
        results.append([*values, *torch.autograd.grad(total, inputs)])
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, torch.float32, budget=3e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget_on_the_gpu(dtype):
    a, b = (torch.randn(300, 256, device="cuda").to(dtype) for _ in range(2))
    weight = (torch.randn(50_257, 256, device="cuda") * 0.1).to(dtype)
    targets = torch.randint(0, 50_257, (300,), device="cuda")
    truth = paired_logprobs(a, b, weight, targets, impl="reference")
    ours = paired_logprobs(a, b, weight, targets)
    for name in ("logprobs_a", "logprobs_b", "kl"):
        assert float((getattr(ours, name) - getattr(truth, name)).abs().max()) <= 1e-3
