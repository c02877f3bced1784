"""Attention of packed groups (see _shared_prefix_layout.py) in parts merged by their log-sum-exp, with exact gradients.

A query q sees keys K = K1 u K2. Each part gives o_i = softmax(q K_i) V_i and l_i = log sum exp(q K_i); the whole is
l = log(e^l1 + e^l2), o = e^(l1 - l) o1 + e^(l2 - l) o2. Backward needs nothing but o and l of the whole: with
p = exp(q k - l) and D = do . o, every part's ds = p (do . v - D) is its share of the exact gradient (FlashAttention,
arXiv 2205.14135, section 3.1 and appendix B). So stock kernels serve both ways, no score outside the mask is computed
and keys of the prefix are never copied per response. Queries (T, Hq, D); keys and values (T, Hkv, D), Hkv divides Hq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hiexp.ops._shared_prefix_layout import Part, PrefixLayout

IMPLEMENTATIONS = ("flash", "torch")
_aten: Any = torch.ops.aten

# q, k, v, causal, scale -> output (t, Hq, D), log-sum-exp (t, Hq); and its gradient for output and lse of the whole.
SegmentForward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
SegmentBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float, impl: str | None = None
) -> Tensor:
    """Attention output ``(T, Hq, D)`` of packed tokens, differentiable once.

    ``impl``: ``"flash"`` uses torch's flash kernels (any float dtype on a CPU; float16 and bfloat16 on a GPU),
    ``"torch"`` materialises the scores of one segment at a time; None takes ``"flash"`` wherever it works.
    """
    if impl is None:
        impl = "flash" if _flash_works(query) else "torch"
    elif impl == "flash" and not _flash_works(query):
        raise ValueError(
            f'impl: "flash" needs a CPU, or float16 or bfloat16 and a head size of a multiple of 8 up to 256 on a GPU; '
            f'got {query.dtype}, head size {query.shape[-1]} on {query.device}; use impl="torch"'
        )
    return _Attention.apply(query, key, value, layout, scale, impl)


def _flash_works(query: Tensor) -> bool:
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float, impl: str
    ) -> Tensor:
        kernel = _kernel(impl, query)[0]
        output, lse = kernel(query, key, value, layout.own, scale)  # (T, Hq, D), (T, Hq)
        if layout.cross is not None:
            behind = slice(layout.cross.queries[0], layout.cross.queries[-1])
            _merge(output[behind], lse[behind], *kernel(query, key, value, layout.cross, scale))
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale, ctx.impl = layout, scale, impl
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        kernel, layout = _kernel(ctx.impl, query)[1], ctx.layout
        inputs = (grad.contiguous(), query, key, value, output, lse)
        grads = kernel(*inputs, layout.own, ctx.scale)
        if layout.cross is not None:
            shares = kernel(*inputs, layout.cross, ctx.scale)
            behind, prefixes = (slice(offsets[0], offsets[-1]) for offsets in (layout.cross.queries, layout.cross.keys))
            for total, rows, share in zip(grads, (behind, prefixes, prefixes), shares, strict=True):
                total[rows] += share
        return (*grads, None, None, None)


def _merge(output: Tensor, lse: Tensor, other_output: Tensor, other_lse: Tensor) -> None:
    """Fold another part of the same queries into ``output`` (t, Hq, D) and ``lse`` (t, Hq), in place."""
    whole = torch.logaddexp(lse, other_lse)
    weight, other_weight = (torch.exp(part - whole)[..., None] for part in (lse, other_lse))
    output.copy_(output * weight + other_output * other_weight)
    lse.copy_(whole)


def _kernel(impl: str, query: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], SegmentBackward]:
    """Forward and backward over a :class:`Part`."""
    if impl == "flash" and query.is_cuda:
        return _cuda_forward, _cuda_backward
    forward, backward = (_cpu_forward, _cpu_backward) if impl == "flash" else (_torch_forward, _torch_backward)

    def over_segments(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        pieces = [forward(q[a], k[b], v[b], part.causal, scale) for a, b in part.segments()]
        return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])

    def back_over_segments(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        pieces = [
            backward(grad[a], q[a], k[b], v[b], output[a], lse[a], part.causal, scale) for a, b in part.segments()
        ]
        grads = [torch.cat(tensors) for tensors in zip(*pieces, strict=True)]
        return grads[0], grads[1], grads[2]

    return over_segments, back_over_segments


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(t, H, ...) as (1, H, t, ...)."""
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, causal, scale=scale)
    return output[0].transpose(0, 1), lse[0].transpose(0, 1)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(grad, q, k, v, output, lse), 0.0, causal, scale=scale
    )
    dq, dk, dv = (tensor[0].transpose(0, 1) for tensor in grads)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """(Hkv, Hq / Hkv, tq, tk) scaled products in at least float32, -inf where a query does not see a key."""
    groups = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # (Hkv, rep, tq, D)
    scores = (groups.to(_wide(q)) * scale) @ k.to(_wide(k)).permute(1, 2, 0)[:, None]
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return scores


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)  # (Hkv, rep, tq)
    output = torch.exp(scores - lse[..., None]) @ v.to(_wide(v)).transpose(0, 1)[:, None]
    return output.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2)


def _torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    def grouped(tensor: Tensor) -> Tensor:  # (tq, Hq, D) -> (Hkv, rep, tq, D)
        return tensor.to(_wide(tensor)).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)

    keys, values = (tensor.to(_wide(tensor)).transpose(0, 1)[:, None] for tensor in (k, v))  # (Hkv, 1, tk, D)
    upstream, queries = grouped(grad), grouped(q)
    probabilities = torch.exp(_scores(q, k, causal, scale) - grouped(lse[..., None]))
    correction = (upstream * grouped(output)).sum(-1, keepdim=True)
    ds = probabilities * (upstream @ values.mT - correction) * scale
    dq = (ds @ keys).permute(2, 0, 1, 3).flatten(1, 2)
    dk, dv = ((x.mT @ y).sum(1).transpose(0, 1) for x, y in ((ds, queries), (probabilities, upstream)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _cuda_arguments(part: Part) -> tuple[Any, ...]:
    """Offsets and longest segments of queries and keys, as the variable-length kernels take them."""
    longest = [max(rows.stop - rows.start for rows in column) for column in zip(*part.segments(), strict=True)]
    # At a longest query segment of 1 the kernel takes its decoding path, whose log-sum-exp is in another order.
    return part.queries_on_device, part.keys_on_device, max(2, longest[0]), longest[1]


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    a, b = slice(part.queries[0], part.queries[-1]), slice(part.keys[0], part.keys[-1])
    output, lse, *_ = _aten._flash_attention_forward(
        q[a], k[b], v[b], *_cuda_arguments(part), 0.0, part.causal, False, scale=scale
    )
    return output, lse.transpose(0, 1)  # the kernel writes (Hq, t)


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = slice(part.queries[0], part.queries[-1]), slice(part.keys[0], part.keys[-1])
    # Without dropout the kernel never reads the state of the random generator; it only wants the two tensors.
    state, unused = (torch.zeros(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
    grads: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
        grad[a], q[a], k[b], v[b], output[a], lse[a].transpose(0, 1).contiguous(),
        *_cuda_arguments(part), 0.0, part.causal, state, unused, scale=scale,
    )  # fmt: skip
    return grads
