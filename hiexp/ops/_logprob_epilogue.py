"""What follows a tile's product in ``token_logprobs``, in torch: the CPU path, twin of kernels/logprob_epilogue.py.

Both functions work in place on ``logits`` (R, W), the bare product of R rows and W vocabulary columns; _logprob_tiles
explains the symbols. ``target`` (R,) is relative to the tile's first column and lies outside 0..W-1 for most tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hiexp._extras import require
from hiexp.ops._logprob_tiles import FLOOR, Upstream

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.token_logprobs")


def finish_logits(
    logits: torch.Tensor, bias: torch.Tensor | None, inverse_temperature: torch.Tensor | None
) -> torch.Tensor:
    if bias is not None:
        logits += bias
    if inverse_temperature is not None:
        logits *= inverse_temperature[:, None]
    return logits


def forward_tile(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    state: torch.Tensor,
    *,
    entropy: bool,
) -> None:
    """Merge a tile into ``state`` (4, R): m, s, a, z_y. ``logits`` is used up."""
    z = finish_logits(logits, bias, inverse_temperature)
    m, s, a, z_y = state
    inside = (target >= 0) & (target < z.shape[1])
    picked = z.gather(1, target.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    z_y.copy_(torch.where(inside, picked, z_y))
    peak = torch.maximum(m, z.amax(1))
    shift = (m - peak).clamp_(min=FLOOR)  # the first tile's m is the lowest float: -inf would turn s = 0 into NaN
    decay = shift.exp()
    z -= peak[:, None]
    if entropy:
        exponential = z.exp()
        a.copy_(decay * (a + shift * s))
        s.mul_(decay).add_(exponential.sum(1))
        a.add_(exponential.mul_(z.clamp_(min=FLOOR)).sum(1))
    else:
        s.mul_(decay).add_(z.exp_().sum(1))
    m.copy_(peak)


def backward_tile(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    upstream: Upstream,
) -> None:
    """Replace ``logits`` by the gradient with respect to the bare product plus bias."""
    z = finish_logits(logits, bias, inverse_temperature)
    z -= lse[:, None]
    if upstream.entropy is None:
        z.exp_().mul_(upstream.constant[:, None])
    else:
        probability = z.exp()
        z.clamp_(min=FLOOR).mul_(-upstream.entropy[:, None]).add_(upstream.constant[:, None]).mul_(probability)
    inside = (target >= 0) & (target < z.shape[1])
    at_target = torch.where(inside, upstream.target, 0.0)
    z.scatter_add_(1, target.clamp(0, z.shape[1] - 1)[:, None], at_target[:, None])
    if inverse_temperature is not None:
        z *= inverse_temperature[:, None]
