"""Loss, gradient and statistics of single tokens, in torch: the CPU path, twin of kernels/policy_loss.py.

The derivative of every term is written out, so one pass gives both what a token adds to the loss and what its log-prob
gets as gradient. ``linear_policy_loss`` needs that: it knows the coefficient of a row as soon as it knows its log-prob.
The formulas stand in hiexp/ops/policy_loss.py, tests compare them with autograd over hiexp/ops/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._policy_batch import Settings, TokenBatch

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.policy_loss")

# exp(20) is about 5e8: a ratio beyond it means a broken rollout, and an infinite one makes the loss NaN. As in verl.
LOG_RATIO_LIMIT = 20.0

# Columns of the statistics. The first ones are summed over tokens, the last two are maxima.
SUMS = (
    "loss", "ratio", "approx_kl", "clip_low", "clip_high", "clip_dual", "kl_ref", "importance", "truncated",
    "engine_kl", "engine_gap", "nonfinite",
)  # fmt: skip
MAXIMA = ("ratio", "importance")


def excess(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x without cancellation near 0, never below 0: the k3 estimator of x = log q - log p."""
    return (torch.expm1(x) - x).clamp(min=0.0)


def token_terms(logprobs: torch.Tensor, batch: TokenBatch, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the loss with respect to ``logprobs`` (N,), and the statistics (len(SUMS) + len(MAXIMA),) float64.

    Without ``batch.old`` the policy itself is the old one: all ratios are 1.
    """
    keep, zero = batch.keep, logprobs.new_zeros(())
    # Everything outside the mask becomes 0 before any exp: otherwise 0 * inf would put NaN into loss or gradient.
    policy = torch.where(keep, logprobs, zero)
    old = policy if batch.old is None else batch.old
    losses, gradient, sums, ratio = _surrogate(policy, old, batch, settings)
    sums["nonfinite"] = torch.isfinite(policy).logical_not_().logical_or_(torch.isfinite(old).logical_not_())
    sums["nonfinite"].logical_or_(torch.isfinite(batch.advantage).logical_not_())
    weight = zero.expand_as(policy)
    if batch.engine is not None:
        sums["nonfinite"].logical_or_(torch.isfinite(batch.engine).logical_not_())
        log_weight = (old - batch.engine).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        weight = log_weight.exp()
        sums |= {"importance": weight, "engine_kl": excess(log_weight), "engine_gap": (old - batch.engine).abs()}
        if settings.truncation:
            sums["truncated"] = weight > settings.truncation
            factor = weight.clamp(max=settings.truncation)
            losses, gradient = losses * factor, gradient * factor
    if batch.ref is not None:
        sums["nonfinite"].logical_or_(torch.isfinite(batch.ref).logical_not_())
        sums["kl_ref"], slope = _kl(policy - batch.ref, settings.kl_estimator)
        if settings.kl_coef:
            losses = losses + settings.kl_coef * sums["kl_ref"]
            gradient = gradient + settings.kl_coef * slope
    sums["loss"] = losses * batch.scale
    return torch.where(keep, gradient * batch.scale, zero), _reduce(keep, sums, ratio, weight)


def _surrogate(
    policy: torch.Tensor, old: torch.Tensor, batch: TokenBatch, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], torch.Tensor]:
    """Token losses, their derivatives, statistics and ratios."""
    raw = policy - old if batch.sequence_log_ratio is None else batch.sequence_log_ratio
    log_ratio = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, advantage = log_ratio.exp(), batch.advantage
    sums: dict[str, Any] = {"ratio": ratio, "approx_kl": excess(log_ratio)}
    below, above = ratio < settings.low, ratio > settings.high
    bounded = ratio.clamp(settings.low, settings.high)
    if settings.kind == "cispo":
        gradient = -bounded * advantage
        return gradient * policy, gradient, sums | {"clip_low": below, "clip_high": above}, ratio
    below, above = below & (advantage < 0), above & (advantage > 0)
    dual = (ratio > settings.dual) & (advantage < 0)
    value = torch.where(below | above, bounded, ratio)
    value = torch.where(dual, settings.dual, value)
    flat = below | above | dual | (raw.abs() > LOG_RATIO_LIMIT)
    gradient = torch.where(flat, 0.0, -ratio * advantage)
    return -value * advantage, gradient, sums | {"clip_low": below, "clip_high": above, "clip_dual": dual}, ratio


def _kl(difference: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate of KL(policy || reference) of a token and its derivative, http://joschu.net/blog/kl-approx.html."""
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return 0.5 * difference.square(), difference
    bounded = difference.clamp(min=-LOG_RATIO_LIMIT)
    inside = difference >= -LOG_RATIO_LIMIT
    return excess(-bounded), torch.where(inside, -torch.expm1(-bounded), 0.0)


def _reduce(keep: torch.Tensor, sums: dict[str, Any], ratio: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=keep.device)
    totals = [torch.where(keep, sums[name], 0.0).sum(dtype=torch.float64) if name in sums else zero for name in SUMS]
    for values in (ratio, weight):
        kept = torch.where(keep, values, 0.0)
        totals.append(torch.cat([kept, kept.new_zeros(1)]).amax().double())
    return torch.stack(totals)


def merge(statistics: list[torch.Tensor], device: Any) -> torch.Tensor:
    """Statistics of several parts of a batch as those of the whole."""
    if not statistics:
        return torch.zeros(len(SUMS) + len(MAXIMA), dtype=torch.float64, device=device)
    table = torch.stack(statistics)
    return torch.cat([table[:, : len(SUMS)].sum(0), table[:, len(SUMS) :].amax(0)])
