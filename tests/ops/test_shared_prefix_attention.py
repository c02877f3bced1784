"""Attention of packed groups against one dense mask, and the packing itself against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hiexp.ops import _shared_prefix_attention
from hiexp.ops._shared_prefix_attention import shared_prefix_attention
from hiexp.ops._shared_prefix_layout import pack_groups


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


group_strategy = st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4))


def pack(shape):
    return pack_groups([(torch.zeros(p, dtype=torch.int64), [torch.zeros(r, dtype=torch.int64) for r in rs])
                        for p, rs in shape])  # fmt: skip


def dense_mask(packed, shape):
    """(T, T) bool from the definition: same group, and either a prefix token or the same response, not later."""
    total = packed.input_ids.shape[1]
    owner = [None] * total  # (group, response or -1 for the prefix, position)
    for group, (prefix, lengths) in enumerate(shape):
        for row in range(packed.starts[group][0], packed.starts[group][0] + prefix):
            owner[row] = (group, -1, row - packed.starts[group][0])
        for response, length in enumerate(lengths):
            for position, row in enumerate(packed.rows(group, response, torch.arange(prefix + length)).tolist()):
                owner[row] = (group, response if position >= prefix else -1, position)
    assert None not in owner
    assert packed.position_ids[0].tolist() == [position for _, _, position in owner]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i, (group, response, position) in enumerate(owner):
        for j, (group_, response_, position_) in enumerate(owner):
            mask[i, j] = group == group_ and response_ in (-1, response) and position_ <= position
    return mask


def attention_inputs(total, dtype=torch.float64, device="cpu"):
    sizes = [(total, 6, 8), (total, 2, 8), (total, 2, 8)]
    return [torch.randn(size, dtype=torch.float64).to(device, dtype).requires_grad_() for size in sizes]


def check_attention(shape, impl):
    packed = pack(shape)
    inputs = attention_inputs(packed.input_ids.shape[1])
    upstream = torch.randn_like(inputs[0])
    mask = dense_mask(packed, shape)
    q, k, v = (x.transpose(0, 1)[None] for x in inputs)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True)[0].transpose(0, 1)
    actual = shared_prefix_attention(*inputs, packed.layout, 0.4, impl)
    assert_exact(actual, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (actual, expected)), strict=True):
        assert_exact(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(st.lists(group_strategy, min_size=1, max_size=4), st.sampled_from(["flash", "torch"]))
def test_attention_equals_a_dense_mask(shape, impl):
    check_attention(shape, impl)


@pytest.mark.parametrize("impl", ["flash", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_as_good_as_torchs_in_the_same_precision(dtype, impl, assert_close):
    shape = [(33, [20, 1, 17]), (5, [])]
    packed = pack(shape)
    total = packed.input_ids.shape[1]
    inputs = attention_inputs(total, dtype)
    upstream = torch.randn_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = shared_prefix_attention(*exact, packed.layout, 0.4, "torch")
    expected = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
    q, k, v = (x.transpose(0, 1)[None] for x in inputs)
    dense = scaled_dot_product_attention(q, k, v, dense_mask(packed, shape), scale=0.4, enable_gqa=True)[0]
    plain = [dense.transpose(0, 1), *torch.autograd.grad(dense, inputs, upstream.transpose(0, 1))]
    actual = shared_prefix_attention(*inputs, packed.layout, 0.4, impl)
    for ours, theirs, value in zip(
        [actual, *torch.autograd.grad(actual, inputs, upstream)], plain, expected, strict=True
    ):
        assert ours.dtype == dtype
        assert_close(ours, value, dtype, (theirs.double() - value).abs().max().item())


def test_attention_passes_gradcheck():
    packed = pack([(3, [2, 1]), (2, [2])])
    torch.autograd.gradcheck(
        lambda *x: shared_prefix_attention(*x, packed.layout, 0.4), attention_inputs(packed.input_ids.shape[1])
    )


class _VariableLengthKernels:
    """torch's CUDA kernels by their signature, computed segment by segment: what is tested is offsets and layouts."""

    @staticmethod
    def _segments(cu_q, cu_k, max_q, max_k):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        q, k = (list(zip(cu.tolist()[:-1], cu.tolist()[1:], strict=True)) for cu in (cu_q, cu_k))
        assert max_q == max(2, *(b - a for a, b in q))
        assert max_k == max(b - a for a, b in k)
        assert all(b > a for a, b in q + k)  # kernels differ in what an empty segment does
        return [(slice(*a), slice(*b)) for a, b in zip(q, k, strict=True)]

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert (dropout, debug) == (0.0, False)
        assert cu_q[-1] == len(q)
        assert cu_k[-1] == len(k)
        segments = self._segments(cu_q, cu_k, max_q, max_k)
        pieces = [_shared_prefix_attention._torch_forward(q[a], k[b], v[b], causal, scale) for a, b in segments]
        output, lse = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        return output, lse.transpose(0, 1).contiguous(), None, None, None

    def _flash_attention_backward(
        self, grad, q, k, v, output, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        assert lse.is_contiguous()
        assert lse.shape == q.shape[1::-1]
        segments = self._segments(cu_q, cu_k, max_q, max_k)
        pieces = [
            _shared_prefix_attention._torch_backward(
                grad[a], q[a], k[b], v[b], output[a], lse.transpose(0, 1)[a], causal, scale
            )
            for a, b in segments
        ]
        return tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))


@pytest.mark.parametrize(
    "shape", [[(4, [3, 0, 2])], [(2, []), (3, [1]), (5, [2, 2])], [(3, [0]), (1, [])], [(1, [1]), (1, [1])]]
)
def test_the_calls_of_variable_length_kernels(shape, monkeypatch):
    monkeypatch.setattr(_shared_prefix_attention, "_aten", _VariableLengthKernels())
    kernels = (_shared_prefix_attention._cuda_forward, _shared_prefix_attention._cuda_backward)
    monkeypatch.setattr(_shared_prefix_attention, "_kernel", lambda impl, query: kernels)
    check_attention(shape, "flash")


def test_the_calls_of_variable_length_kernels_fit_torchs_signature():
    layout = pack([(4, [3, 2])]).layout
    q, k, v = (x.detach().to("meta", torch.bfloat16) for x in attention_inputs(9))
    for part, queries, keys in ((layout.own, 9, 9), (layout.cross, 5, 4)):
        output, lse = _shared_prefix_attention._cuda_forward(q, k, v, part, 0.4)
        assert output.shape == (queries, 6, 8)
        assert lse.shape == (queries, 6)
        whole = torch.empty(9, 6, device="meta")
        grads = _shared_prefix_attention._cuda_backward(q, q, k, v, q, whole, part, 0.4)
        assert [grad.shape for grad in grads] == [(queries, 6, 8), (keys, 2, 8), (keys, 2, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [[(300, [70, 1, 130]), (5, [64, 64]), (77, [])], [(1, [1]), (3, [1])], [(9, [])]])
def test_attention_on_a_gpu(dtype, shape, assert_close):
    packed = pack_groups([(torch.zeros(p, dtype=torch.int64, device="cuda"),
                           [torch.zeros(r, dtype=torch.int64, device="cuda") for r in rs])
                          for p, rs in shape])  # fmt: skip
    inputs = attention_inputs(packed.input_ids.shape[1], dtype, "cuda")
    upstream = torch.randn_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = shared_prefix_attention(*exact, packed.layout, 0.35, "torch")
    actual = shared_prefix_attention(*inputs, packed.layout, 0.35, "flash")
    assert_close(actual, truth, dtype)
    expected = torch.autograd.grad(truth, exact, upstream.double())
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, upstream), expected, strict=True):
        scale = theirs.abs().max().item()
        assert_close(ours / scale, theirs / scale, dtype)
