"""The C++ row epilogue against its torch twin, and the logits kept for the backward pass."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from hiexp import token_logprobs
from hiexp.ops import _logprob_epilogue, _logprob_native, _logprob_tiles


def tile(rows, columns, dtype, extras):
    target = torch.tensor([-5, 0, columns - 1, columns, columns // 2])[torch.arange(rows) % 5]
    bias = torch.randn(columns, dtype=dtype) if extras else None
    inverse = torch.rand(rows, dtype=dtype) + 0.5 if extras else None
    return 3 * torch.randn(rows, columns, dtype=dtype), bias, inverse, target


def fresh_state(rows, dtype):
    state = torch.zeros(4, rows, dtype=dtype)
    state[0] = torch.finfo(dtype).min
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (5, 17), (40, 31), (3, 4096), (6, 1000)])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_forward_equals_its_twin(assert_close, dtype, rows, columns, extras, entropy):
    logits, bias, inverse, target = tile(rows, columns, dtype, extras)
    ours, theirs = fresh_state(rows, dtype), fresh_state(rows, dtype)
    for shift in (0, 2, -3):  # three tiles into one state, the maximum rising and not rising
        moved = logits + shift
        before = moved.clone()
        _logprob_native.forward_tile(moved, bias, inverse, target, ours, entropy=entropy)
        assert torch.equal(moved, before)  # logits that are kept must survive
        _logprob_epilogue.forward_tile(moved, bias, inverse, target, theirs, entropy=entropy)
    for mine, other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max()) if rows else 0.0
        assert_close(mine, other, dtype, budget=1e-6 * scale if dtype == torch.float32 else 1e-13 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (5, 17), (40, 31), (3, 4096), (6, 1000)])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_backward_equals_its_twin(assert_close, dtype, rows, columns, extras, entropy):
    logits, bias, inverse, target = tile(rows, columns, dtype, extras)
    factors = [torch.randn(rows, dtype=dtype) for _ in range(3)]
    upstream = _logprob_tiles.Upstream(factors[0], factors[1], factors[2] if entropy else None)
    lse = logits.logsumexp(1) + 2
    arguments = (bias, inverse, target, lse, upstream)
    out, kept = torch.full_like(logits, torch.nan), logits.clone()
    _logprob_native.backward_tile(kept, *arguments, out=out)
    assert torch.equal(kept, logits)
    in_place = logits.clone()
    _logprob_native.backward_tile(in_place, *arguments)
    assert torch.equal(in_place, out)
    _logprob_epilogue.backward_tile(logits, *arguments)
    scale = float(logits.abs().max()) if rows else 0.0
    assert_close(out, logits, dtype, budget=1e-6 * scale if dtype == torch.float32 else 1e-13 * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_is_accurate_over_its_whole_range(dtype):
    """One column a tile: the gradient of a row is exp(z - lse). Error in units of the last place of the result."""
    x = np.linspace(-86.0 if dtype == np.float32 else -700.0, 0.0, 200_001).astype(dtype)
    logits = torch.from_numpy(x.copy())[:, None]
    one, zero = torch.ones_like(logits[:, 0]), torch.zeros_like(logits[:, 0])
    _logprob_native.backward_tile(
        logits, None, None, torch.full((len(x),), -1), zero, _logprob_tiles.Upstream(zero, one, None)
    )
    truth = np.exp(x.astype(np.longdouble))
    error = np.abs(logits[:, 0].numpy().astype(np.longdouble) - truth) / np.spacing(truth.astype(dtype))
    assert error.max() < 2.0


def test_threads_do_not_change_a_bit():
    logits, bias, inverse, target = tile(333, 1001, torch.float32, True)
    states, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            states.append(fresh_state(333, torch.float32))
            _logprob_native.forward_tile(logits, bias, inverse, target, states[-1], entropy=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(state, states[0]) for state in states)


def test_offsets_beyond_31_bits(tmp_path):
    """Three rows 2^30 + 16 floats apart: the last begins beyond 2^31. The file is sparse, only the rows exist."""
    stride, columns = 2**30 + 16, 37
    memory = np.memmap(tmp_path / "logits", dtype=np.float32, mode="w+", shape=(2 * stride + columns,))
    far = torch.from_numpy(memory).as_strided((3, columns), (stride, 1))
    near = torch.randn(3, columns)
    far.copy_(near)
    target = torch.tensor([0, 5, columns - 1])
    states = [fresh_state(3, torch.float32) for _ in range(2)]
    for logits, state in zip((far, near), states, strict=True):
        _logprob_native.forward_tile(logits, None, None, target, state, entropy=True)
    assert torch.equal(*states)
    upstream = _logprob_tiles.Upstream(torch.randn(3), torch.randn(3), None)
    for logits in (far, near):
        _logprob_native.backward_tile(logits, None, None, target, near.new_zeros(3), upstream)
    assert torch.equal(far, near)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(_logprob_tiles, "tile_shape", lambda device: (8, 16))


@pytest.mark.parametrize("limit", [0, 1, 8 * 16 * 8, 3000, 5000, 2**20], ids=lambda x: f"{x} bytes")
@pytest.mark.parametrize("masked", [False, True])
def test_kept_logits_change_nothing(small_tiles, monkeypatch, assert_close, limit, masked):
    """Nothing, some tiles or all tiles kept; a second backward pass over the same graph; rows without a gradient."""
    hidden = torch.randn(21, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (21,))
    factors = torch.randn(21, dtype=torch.float64)
    if masked:
        factors[:9] = 0.0
        factors[::2] = 0.0
    truth = token_logprobs(hidden, weight, targets, entropy=True, impl="reference", temperature=0.5)
    expected = torch.autograd.grad(((truth.logprobs + truth.entropy) * factors).sum(), [hidden, weight])
    monkeypatch.setattr(_logprob_native, "KEPT_LIMIT", limit)
    out = token_logprobs(hidden, weight, targets, entropy=True, temperature=0.5)
    total = ((out.logprobs + out.entropy) * factors).sum()
    for _ in range(2):
        ours = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
        for mine, other in zip(ours, expected, strict=True):
            assert_close(mine, other, "float64")


def test_a_kept_tile_is_not_multiplied_again(small_tiles, monkeypatch):
    shapes, original = [], _logprob_tiles.product

    def recorded(*arguments):
        shapes.append(len(arguments[0]))
        return original(*arguments)

    monkeypatch.setattr(_logprob_tiles, "product", recorded)
    hidden, weight = torch.randn(16, 5, requires_grad=True), torch.randn(48, 5)
    out = token_logprobs(hidden, weight, torch.arange(16))
    assert len(shapes) == 6
    out.logprobs.sum().backward()
    assert len(shapes) == 6


def test_all_open_graphs_together_stay_within_the_limit(small_tiles, monkeypatch):
    monkeypatch.setattr(_logprob_native, "KEPT_LIMIT", 10_000)
    gc.collect()
    assert _logprob_native._kept_bytes == 0
    hidden, weight = torch.randn(16, 5, requires_grad=True), torch.randn(64, 5, requires_grad=True)
    graphs = [token_logprobs(hidden, weight, torch.arange(16)).logprobs for _ in range(4)]  # 4096 bytes each
    assert 8192 <= _logprob_native._kept_bytes <= 10_000
    sum(graph.sum() for graph in graphs).backward()
    del graphs
    gc.collect()
    assert _logprob_native._kept_bytes == 0
    with torch.no_grad():
        out = token_logprobs(hidden, weight, torch.arange(16))
        assert _logprob_native._kept_bytes == 0
    assert out.logprobs.shape == (16,)
