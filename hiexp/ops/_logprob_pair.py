"""Tile loops behind ``paired_logprobs``: both sides' logits exist one tile at a time, as in _logprob_tiles.py.

Besides m, s and y (the target's logit) of each side a row carries

    d = sum exp(z_a - m_a) ((z_a - m_a) - (z_b - m_b)),   KL(a || b) = d / s_a - log s_a + log s_b

The maxima are inside the sum, so a large offset between the sides does not cancel digits. Gradients, with the upstream
g of a log-prob, l of a log-sum-exp and k of the KL (c = l - g):

    dz_a = p_a (c_a + k (log p_a - log p_b - KL)) + g_a [v = y]
    dz_b = p_b (c_b + k) - k p_a + g_b [v = y]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._logprob_tiles import Problem, add_product, product, slices, tile_shape, tiles

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.paired_logprobs")


@dataclass(frozen=True)
class PairEpilogue:
    """What follows the two products of a tile, as in _logprob_pair_epilogue.py."""

    forward: Callable[..., None]
    backward: Callable[..., None]


@dataclass(frozen=True)
class PairUpstream:
    """(T,) each: what the backward pass needs to know of a row. The constants hold the terms that multiply p."""

    lse_a: torch.Tensor
    lse_b: torch.Tensor
    target_a: torch.Tensor  # g_a
    target_b: torch.Tensor
    constant_a: torch.Tensor  # c_a - k KL
    constant_b: torch.Tensor  # c_b + k
    kl: torch.Tensor  # k

    def of(self, rows: torch.Tensor | slice) -> PairUpstream:
        return PairUpstream(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def active(self) -> torch.Tensor:
        factors = (self.target_a, self.target_b, self.constant_a, self.constant_b, self.kl)
        return torch.stack([factor != 0 for factor in factors]).any(0).nonzero().squeeze(1)


def forward(a: Problem, b: Problem, epilogue: PairEpilogue) -> tuple[Any, Any, Any, Any, Any]:
    """(log-probs a, log-probs b, KL, log-sum-exp a, log-sum-exp b), (T,) each, of the accumulator type."""
    hidden_a, hidden_b = a.hidden.to(a.operand), b.hidden.to(b.operand)
    total, kind = len(hidden_a), a.accumulator
    padded = -(-total // 16) * 16  # rows of the state start at aligned addresses whatever T is
    state = hidden_a.new_zeros((7, padded), dtype=kind)[:, :total]
    state[0] = state[3] = torch.finfo(kind).min
    for (columns, weight_a, bias), (_, weight_b, _) in zip(tiles(a), tiles(b), strict=True):
        for rows in slices(total, tile_shape(hidden_a.device)[0]):
            z_a = product(hidden_a[rows], weight_a.t(), kind)  # (R, W)
            z_b = product(hidden_b[rows], weight_b.t(), kind)
            inverse = None if a.inverse_temperature is None else a.inverse_temperature[rows]
            epilogue.forward(z_a, z_b, bias, inverse, a.targets[rows] - columns.start, state[:, rows])
    m_a, s_a, y_a, m_b, s_b, y_b, d = state
    log_s_a, log_s_b = s_a.log(), s_b.log()
    kl = (d / s_a - log_s_a + log_s_b).clamp_(min=0.0)
    # The order of the subtractions as in _logprob_tiles.forward.
    logprobs = [(y - m - log_s).clamp_(max=0.0) for y, m, log_s in ((y_a, m_a, log_s_a), (y_b, m_b, log_s_b))]
    return logprobs[0], logprobs[1], kl, m_a + log_s_a, m_b + log_s_b


@dataclass
class PairGradients:
    """Gradients asked for, None for the others; the hidden ones are of the accumulator type and start at zero."""

    hidden_a: torch.Tensor | None
    hidden_b: torch.Tensor | None
    weight: torch.Tensor | None
    weight_b: torch.Tensor | None  # None too where both sides share one weight
    bias: torch.Tensor | None


def backward(
    a: Problem, b: Problem, epilogue: PairEpilogue, upstream: PairUpstream, needs: tuple[bool, bool, bool, bool, bool]
) -> PairGradients:
    """``needs`` in the order of ``PairGradients``; only rows with a gradient take part in the products."""
    rows = upstream.active()
    everything = len(rows) == len(upstream.kl)
    part_a, part_b = (a, b) if everything else (a.select(rows), b.select(rows))
    inputs = (part_a.hidden, part_b.hidden, a.weight, b.weight, a.bias)
    kinds = (a.accumulator, a.accumulator, a.weight.dtype, b.weight.dtype, a.accumulator)
    grads = PairGradients(
        *(torch.zeros_like(x, dtype=kind) if need and x is not None else None
          for x, kind, need in zip(inputs, kinds, needs, strict=True))
    )  # fmt: skip
    _accumulate(
        part_a, part_b, epilogue, upstream if everything else upstream.of(rows), grads, shared=b.weight is a.weight
    )
    if not everything:
        for name, problem in (("hidden_a", a), ("hidden_b", b)):
            grad = getattr(grads, name)
            if grad is not None:
                full = torch.zeros_like(problem.hidden, dtype=a.accumulator)
                setattr(grads, name, full.index_copy_(0, rows, grad))
    return grads


def _accumulate(
    a: Problem, b: Problem, epilogue: PairEpilogue, upstream: PairUpstream, grads: PairGradients, *, shared: bool
) -> None:
    hidden_a, hidden_b, kind = a.hidden.to(a.operand), b.hidden.to(b.operand), a.accumulator
    for (columns, weight_a, bias), (_, weight_b, _) in zip(tiles(a), tiles(b), strict=True):
        sums = [None if grad is None else torch.zeros_like(w, dtype=kind)
                for grad, w in ((grads.weight, weight_a), (grads.weight_b, weight_b))]  # fmt: skip
        sum_b = sums[0] if shared else sums[1]
        for rows in slices(len(hidden_a), tile_shape(hidden_a.device)[0]):
            z_a = product(hidden_a[rows], weight_a.t(), kind)  # (R, W), become their own gradients
            z_b = product(hidden_b[rows], weight_b.t(), kind)
            inverse = None if a.inverse_temperature is None else a.inverse_temperature[rows]
            epilogue.backward(z_a, z_b, bias, inverse, a.targets[rows] - columns.start, upstream.of(rows))
            if grads.bias is not None:
                grads.bias[columns] += z_a.sum(0) + z_b.sum(0)
            _add_side(z_a.to(a.operand), hidden_a[rows], weight_a, _rows_of(grads.hidden_a, rows), sums[0])
            _add_side(z_b.to(b.operand), hidden_b[rows], weight_b, _rows_of(grads.hidden_b, rows), sum_b)
        for grad, total in ((grads.weight, sums[0]), (grads.weight_b, sums[1])):
            if grad is not None:
                grad[columns] = total


def _rows_of(grad: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if grad is None else grad[rows]


def _add_side(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    hidden_grad: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
) -> None:
    if hidden_grad is not None:
        add_product(hidden_grad, gradient, weight)
    if weight_sum is not None:
        add_product(weight_sum, gradient.t(), hidden)
