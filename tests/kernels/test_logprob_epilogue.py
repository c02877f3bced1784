"""The Triton row kernels against their torch twin and the float64 reference; GPU or interpreter."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'hiexp[gpu]'")

from hiexp import token_logprobs
from hiexp.ops import _logprob_epilogue, _logprob_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_interpreter.py")


def tile(rows, columns, dtype, seed=0):
    """Logits and per-row inputs of one tile; target offsets lie before, inside, at both edges and after it."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    target = torch.tensor([-5, 0, columns - 1, columns, columns // 2])[torch.arange(rows) % 5].to(DEVICE)
    return 3 * random(rows, columns), random(columns), random(rows).abs() + 0.5, target, random


def fresh_state(rows, dtype):
    state = torch.zeros(4, rows, dtype=dtype, device=DEVICE)
    state[0] = torch.finfo(dtype).min
    return state


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (3, 4096), (2, 4097), (6, 9000)])
@pytest.mark.parametrize("extras", [False, True])
def test_forward_equals_its_twin(dtype, rows, columns, extras, assert_close):
    from hiexp.kernels import logprob_epilogue

    logits, bias, inverse, target, _ = tile(rows, columns, dtype)
    bias, inverse = (bias, inverse) if extras else (None, None)
    ours, theirs = fresh_state(rows, dtype), fresh_state(rows, dtype)
    for shift in (0, 2, -3):  # three tiles into one state, the maximum rising and not rising
        logprob_epilogue.forward_tile(logits + shift, bias, inverse, target, ours, entropy=extras)
        _logprob_epilogue.forward_tile(logits + shift, bias, inverse, target, theirs, entropy=extras)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, dtype, budget=1e-5 * float(other.abs().max()) if dtype == torch.float32 else 0.0)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (3, 2048), (2, 2049), (6, 5003)])
@pytest.mark.parametrize("extras", [False, True])
def test_backward_equals_its_twin(dtype, rows, columns, extras, assert_close):
    from hiexp.kernels import logprob_epilogue

    logits, bias, inverse, target, random = tile(rows, columns, dtype)
    bias, inverse = (bias, inverse) if extras else (None, None)
    upstream = _logprob_tiles.Upstream(random(rows), random(rows), random(rows) if extras else None)
    lse = logits.logsumexp(1)
    ours, theirs = logits.clone(), logits.clone()
    logprob_epilogue.backward_tile(ours, bias, inverse, target, lse, upstream)
    _logprob_epilogue.backward_tile(theirs, bias, inverse, target, lse, upstream)
    assert_close(ours, theirs, dtype, budget=1e-5 if dtype == torch.float32 else 0.0)


@runs_kernels
def test_a_tile_of_minus_infinity_leaves_no_nan():
    from hiexp.kernels import logprob_epilogue

    state = fresh_state(2, torch.float32)
    target = torch.tensor([3, 3], device=DEVICE)
    forbidden = torch.full((2, 7), -torch.inf, device=DEVICE)
    logprob_epilogue.forward_tile(forbidden, None, None, target - 20, state, entropy=True)
    logprob_epilogue.forward_tile(torch.zeros(2, 7, device=DEVICE), None, None, target, state, entropy=True)
    logprob_epilogue.forward_tile(forbidden.clone(), None, None, target + 20, state, entropy=True)
    assert state.tolist() == [[0.0, 0.0], [7.0, 7.0], [0.0, 0.0], [0.0, 0.0]]


@runs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_spoilt_row_is_flagged_and_spoils_no_other(assert_close, bad):
    hidden = torch.randn(6, 5, device=DEVICE)
    hidden[2, 1] = bad
    weight = torch.randn(70, 5, device=DEVICE, requires_grad=True)
    targets = torch.arange(6, device=DEVICE)
    out = token_logprobs(hidden, weight, targets, impl="triton", entropy=True)
    assert out.finite.tolist() == [True, True, False, True, True, True]
    ours = torch.autograd.grad((out.logprobs + out.entropy).where(out.finite, 0.0).sum(), weight)[0]
    good = token_logprobs(hidden, weight, targets, rows=out.finite, impl="reference", entropy=True)
    truth = torch.autograd.grad((good.logprobs + good.entropy).sum(), weight)[0]
    assert_close(ours, truth, torch.float32, budget=1e-5)


@runs_kernels
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_token_logprobs_end_to_end(monkeypatch, assert_close, rows):
    """Tiles of 4 rows and 40 columns over V = 99: every kind of edge, forward and backward."""
    monkeypatch.setattr(_logprob_tiles, "tile_shape", lambda device: (4, 40))
    hidden = torch.randn(rows, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(99, 6, device=DEVICE, requires_grad=True)
    bias = torch.randn(99, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 39, 40, 79, 80, 98, 5, 6, 7], device=DEVICE)[:rows]
    temperature = torch.linspace(0.5, 1.5, rows, device=DEVICE)
    results = []
    for impl in ("triton", "reference"):
        out = token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, entropy=True, impl=impl)
        total = (out.logprobs * 1.3 + out.entropy * 0.7 + out.lse * 0.2).sum()
        results.append([out.logprobs, out.entropy, out.lse, *torch.autograd.grad(total, [hidden, weight, bias])])
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, torch.float32, budget=2e-5)


@pytest.mark.skipif(not INTERPRETED, reason="host memory")
def test_offsets_beyond_31_bits(tmp_path):
    """Three rows 2^30 + 16 floats apart: the last begins beyond 2^31. The file is sparse, only the rows exist."""
    from hiexp.kernels import logprob_epilogue

    stride, columns = 2**30 + 16, 37
    memory = np.memmap(tmp_path / "logits", dtype=np.float32, mode="w+", shape=(2 * stride + columns,))
    far = torch.from_numpy(memory).as_strided((3, columns), (stride, 1))
    near, target = torch.randn(3, columns), torch.tensor([0, 5, columns - 1])
    far.copy_(near)
    states = [fresh_state(3, torch.float32) for _ in range(2)]
    upstream = _logprob_tiles.Upstream(torch.randn(3), torch.randn(3), None)
    for logits, state in zip((far, near), states, strict=True):
        logprob_epilogue.forward_tile(logits, None, None, target, state, entropy=True)
        logprob_epilogue.backward_tile(logits, None, None, target, torch.zeros(3), upstream)
    assert torch.equal(*states)
    assert torch.equal(far, near)


@pytest.mark.parametrize("module", ["logprob_epilogue", "logprob_pair", "logprob_persistent"])
def test_nothing_that_changes_between_batches_is_compiled_in(module):
    """Constants are flags and tile sizes; counts of rows, columns and splits are not specialised on their values."""
    module = importlib.import_module(f"hiexp.kernels.{module}")
    flags = {"HAS_BIAS", "HAS_TEMPERATURE", "ENTROPY", "TMA", "PRECISION", "SPLIT_TILES", "GROUP"}
    for kernel in {kernel for kernel, *_ in module.compile_targets()}:
        function = getattr(kernel, "fn", kernel)
        for name, annotation in function.__annotations__.items():
            assert "constexpr" not in str(annotation) or name in flags or name.startswith("BLOCK"), name
        if not INTERPRETED:
            varying = {"rows", "columns", "row_blocks", "splits"}
            assert all(p.do_not_specialize for p in kernel.params if p.name in varying)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget_on_the_gpu(dtype, impl):
    hidden = torch.randn(300, 256, device="cuda", dtype=dtype)
    weight = (torch.randn(50_257, 256, device="cuda") * 0.1).to(dtype)
    targets = torch.randint(0, 50_257, (300,), device="cuda")
    truth = token_logprobs(hidden, weight, targets, impl="reference", entropy=True)
    ours = token_logprobs(hidden, weight, targets, entropy=True, impl=impl)
    assert float((ours.logprobs - truth.logprobs).abs().max()) <= 1e-3  # nats, the project's stated bound
    assert float((ours.entropy - truth.entropy).abs().max()) <= 1e-3
