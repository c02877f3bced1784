"""What follows the product of a chunk in ``linear_policy_loss``: rows of logits to log-probs, then to p - [v = y].

The torch functions (CPU) take rows a few at a time so that all passes over a row after the first find it in the cache;
they leave exp(z - max) in place, which is the softmax up to the sum, so no exponential is computed twice. On a GPU the
Triton kernels of kernels/logprob_epilogue.py and kernels/policy_rows.py do the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._logprob_tiles import FLOOR

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.linear_policy_loss")

# Bytes of logits handled at once: a share of the second-level cache of one core.
_CACHE = 2**20


@dataclass(frozen=True)
class RowScores:
    """(R,) each, ``entropy`` maybe empty. ``normaliser``: sum exp(z - max) in torch, the log-sum-exp in Triton."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    normaliser: torch.Tensor

    def of(self, rows: torch.Tensor) -> RowScores:
        """The rows ``rows`` of it."""
        return RowScores(self.logprobs[rows], self.entropy, self.normaliser[rows])


@dataclass(frozen=True)
class Rows:
    """``score`` (logits, bias, inverse_temperature, targets, *, entropy) gives RowScores and may change ``logits``;
    ``difference`` (what it left, ..., scores, dtype) gives D (R, V) and the factor (R,) that makes it p - [v = y]."""

    score: Callable[..., RowScores]
    difference: Callable[..., tuple[Any, Any]]


def score_torch(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    entropy: bool,
) -> RowScores:
    """Log-probs of (R, V) bare logits, which become exp(z - max)."""
    target_logit, sums = torch.empty_like(logits[:, 0]), torch.empty_like(logits[:, 0])
    weighted = torch.empty_like(sums) if entropy else sums.new_empty(0)
    step = max(1, _CACHE // (logits.shape[1] * logits.element_size()))
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        z = logits[block]
        if bias is not None:
            z += bias
        if inverse_temperature is not None:
            z *= inverse_temperature[block, None]
        z -= z.amax(1, keepdim=True)
        target_logit[block] = z.gather(1, targets[block, None]).squeeze(1)
        if entropy:
            shifted = z.clamp(min=FLOOR)  # a bias may be -inf, and 0 * -inf would be NaN
            z.exp_()
            weighted[block] = shifted.mul_(z).sum(1)
        else:
            z.exp_()
        sums[block] = z.sum(1)
    log_sum = sums.log()
    entropies = (log_sum - weighted / sums).clamp_(min=0.0) if entropy else weighted
    return RowScores((target_logit - log_sum).clamp_(max=0.0), entropies, sums)


def difference_torch(
    exponentials: torch.Tensor,
    bias: Any,
    inverse_temperature: Any,
    targets: torch.Tensor,
    scores: RowScores,
    dtype: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Only the target's column changes: exp(z - max) - sum [v = y] is p - [v = y] times the sum."""
    exponentials.scatter_add_(1, targets[:, None], -scores.normaliser[:, None])
    return exponentials.to(dtype), scores.normaliser.reciprocal()


def rows_of(impl: str) -> Rows:
    """The implementation for ``impl``."""
    if impl == "torch":
        return Rows(score_torch, difference_torch)
    require("triton", "gpu", 'hiexp.linear_policy_loss(impl="triton")')
    from hiexp.kernels import policy_rows as kernels

    return Rows(kernels.score, kernels.difference)
