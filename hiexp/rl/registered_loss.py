"""A loss of one's own around the function that makes it: importance weights, KL term, aggregation, metrics.

The fused losses get their gradient while the logits exist; a function over log-probs gets it by autograd, through
``hiexp.token_logprobs``, which computes the logits once more in backward: four products (8THV) instead of three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hiexp.ops._policy_batch import check_settings, check_tokens, pack
from hiexp.ops._policy_terms import _kl
from hiexp.ops.policy_loss import PolicyLoss, policy_loss
from hiexp.ops.token_logprobs import TokenLogprobs
from hiexp.rl.losses import LossBatch, LossFunction


@dataclass(frozen=True)
class RegisteredLoss(PolicyLoss):
    """A PolicyLoss with the function's own metrics, (N,) values by name."""

    own: Mapping[str, torch.Tensor]

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Those of PolicyLoss, and ``loss/NAME``: means over tokens."""
        return {**super().metrics, **{f"loss/{name}": float(values.mean()) for name, values in self.own.items()}}


def registered_loss(
    function: LossFunction, scores: TokenLogprobs, old_logprobs: Any, advantages: Any, *, cu_seqlens: Any,
    ref_logprobs: Any, engine_logprobs: Any, importance: Any, clip_low: float, clip_high: float, kl_coef: float,
    kl_estimator: str, aggregation: str, constant_length: int | None, denominator: float,
    loss_settings: Mapping[str, float],
) -> RegisteredLoss:  # fmt: skip
    """``function`` over the N trained tokens of S rollouts; arguments as for ``hiexp.policy_loss``, and

    Args:
        scores: log-probs and entropy (N,), with gradient.
        importance: (N,) weights of the token losses, the KL term excepted; None is 1.
        loss_settings: numbers that the function reads.

    Raises:
        TypeError, ValueError: the function returned something else than losses (N,) with a gradient.
    """
    logprobs, entropy = scores.logprobs, scores.entropy
    assert entropy is not None
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    settings = check_settings(
        "grpo", clip_low, clip_high, None, kl_coef, kl_estimator, None, aggregation, constant_length, denominator,
        ref=ref_logprobs, engine=engine_logprobs,
    )  # fmt: skip
    tensors = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "engine_logprobs": engine_logprobs}
    inputs = check_tokens(
        len(logprobs), logprobs.device, logprobs.dtype, tensors, advantages, mask, cu_seqlens, None
    )  # fmt: skip
    batch, _ = pack(inputs, settings, logprobs.dtype)
    seen = LossBatch(
        logprobs, entropy, logprobs.detach() if batch.old is None else batch.old, batch.advantage, batch.ref,
        batch.engine, mask, inputs.cu_seqlens,
        {"clip_low": clip_low, "clip_high": clip_high, **loss_settings},
    )  # fmt: skip
    losses, own = _checked(function, function(seen), logprobs)
    losses = losses if importance is None else losses * importance
    if batch.ref is not None and kl_coef:
        losses = losses + kl_coef * _kl(logprobs - batch.ref, kl_estimator)[0]
    # The measures common to all losses, as if this were grpo: ratios, clipped shares, KL.
    monitor = policy_loss(
        logprobs.detach(), old_logprobs, advantages, mask=mask, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
        clip_low=clip_low, clip_high=clip_high, engine_logprobs=engine_logprobs, aggregation=aggregation,
        constant_length=constant_length, denominator=denominator,
    )  # fmt: skip
    values = torch.cat([monitor.values, entropy.detach().double().sum()[None]])
    total = (losses * batch.scale).sum()
    return RegisteredLoss(total, values, monitor.optional | {"entropy"}, logprobs.detach(), own)


def _checked(function: LossFunction, returned: Any, logprobs: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """Losses and metrics of the function, or an error that names it."""
    name = f"loss {getattr(function, '__name__', function)!r}"
    losses, own = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(own, Mapping):
        raise TypeError(f"{name}: expected metrics as a mapping from name to tensor, got {type(own).__name__}")
    for label, value in {"losses": losses, **own}.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected {label} to be a tensor (N,), got {type(value).__name__}")
        if value.shape != logprobs.shape:
            raise ValueError(
                f"{name}: expected {label} of shape {tuple(logprobs.shape)}, one a token, got {tuple(value.shape)}"
            )
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise ValueError(f"{name}: expected losses that depend on batch.logprobs, got a tensor without gradient")
    return losses, {str(label): value.detach() for label, value in own.items()}
