"""What follows the two products of a tile in ``paired_logprobs``, in torch; twin of kernels/logprob_pair.py.

``z_a``, ``z_b`` (R, W): the bare products of the same rows under both sides. ``target`` (R,) is relative to the tile's
first column. _logprob_pair.py explains the other symbols.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hiexp._extras import require
from hiexp.ops._logprob_epilogue import finish_logits
from hiexp.ops._logprob_tiles import FLOOR

if TYPE_CHECKING:
    import torch

    from hiexp.ops._logprob_pair import PairUpstream
else:
    torch = require("torch", "train", "hiexp.paired_logprobs")

# Bounds m_b - (new m_b) of the first tile, whose m_b is the lowest float; it is multiplied by s_a = 0.
_LOWEST_SHIFT = -1e30


def forward_tile(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    state: torch.Tensor,
) -> None:
    """Merge a tile into ``state`` (7, R): m_a, s_a, y_a, m_b, s_b, y_b, d. Both tiles are used up."""
    d = state[6]
    shifts, decays = [], []
    for z, m, y in ((z_a, state[0], state[2]), (z_b, state[3], state[5])):
        finish_logits(z, bias, inverse_temperature)
        inside = (target >= 0) & (target < z.shape[1])
        picked = z.gather(1, target.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        y.copy_(torch.where(inside, picked, y))
        peak = torch.maximum(m, z.amax(1))
        shifts.append((m - peak).clamp_(min=_LOWEST_SHIFT))
        decays.append(shifts[-1].exp())
        m.copy_(peak)
        z -= peak[:, None]
    exponential = z_a.exp()
    z_a -= z_b
    difference = z_a.mul_(exponential).masked_fill_(exponential == 0, 0.0)
    # a shift below FLOOR has decay 0: what it multiplies does not matter, but must not overflow
    moved = shifts[0].clamp(min=FLOOR) - shifts[1]
    d.add_(moved.mul_(state[1])).mul_(decays[0]).add_(difference.sum(1))
    state[1].mul_(decays[0]).add_(exponential.sum(1))
    state[4].mul_(decays[1]).add_(z_b.exp_().sum(1))


def backward_tile(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    upstream: PairUpstream,
) -> None:
    """Replace both tiles by the gradients with respect to the bare products plus bias."""
    for z, lse in ((z_a, upstream.lse_a), (z_b, upstream.lse_b)):
        finish_logits(z, bias, inverse_temperature)
        z -= lse[:, None]
    p_a, p_b = z_a.exp(), z_b.exp()
    k = upstream.kl[:, None]
    z_a.sub_(z_b).masked_fill_(p_a == 0, 0.0)
    z_a.mul_(k).add_(upstream.constant_a[:, None]).mul_(p_a)
    torch.mul(p_b, upstream.constant_b[:, None], out=z_b).sub_(p_a.mul_(k))
    inside = (target >= 0) & (target < z_a.shape[1])
    column = target.clamp(0, z_a.shape[1] - 1)[:, None]
    for z, g in ((z_a, upstream.target_a), (z_b, upstream.target_b)):
        z.scatter_add_(1, column, torch.where(inside, g, 0.0)[:, None])
        if inverse_temperature is not None:
            z *= inverse_temperature[:, None]
