"""Slow, obvious float64 versions of the numeric operations: the oracles of the tests, written from the formulas alone.

Nothing here shares code with the fast versions. ``token_logprobs`` is also reachable as ``impl="reference"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hiexp._extras import require

Array = np.ndarray[Any, Any]


def group_advantage(
    rewards: Sequence[float],
    group_ids: Sequence[int],
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Array:
    """(N,) advantages of finite rewards, one row at a time (GRPO, arXiv:2402.03300, eq. 4; RLOO, arXiv:2402.14740)."""
    values = np.asarray(rewards, dtype=np.float64)
    labels = np.asarray(group_ids)
    result = np.zeros(len(values))
    for i, reward in enumerate(values):
        group = values[labels == labels[i]]
        if len(group) == 1:
            result[i] = reward if singleton == "raw" else 0.0
            continue
        others = np.delete(values, i)[np.delete(labels, i) == labels[i]]
        result[i] = reward - {"mean": group.mean(), "leave_one_out": others.mean(), "none": 0.0}[baseline]
        if scale != "none":
            over = group if scale == "std" else values
            all_equal = np.all(over == over[0])
            result[i] = 0.0 if all_equal else result[i] / (over.std(ddof=ddof) + eps)
    return result


def token_logprobs(
    hidden: Any, weight: Any, targets: Any, *, bias: Any = None, temperature: Any = None
) -> tuple[Any, Any, Any]:
    """(log-probs, entropy, log-sum-exp), (T,) each, through all (T, V) logits in float64; differentiable torch."""
    torch = require("torch", "train", "hiexp.ops.reference")
    logits = hidden.double() @ weight.double().T  # (T, V)
    if bias is not None:
        logits = logits + bias.double()
    if temperature is not None:
        logits = logits / temperature.double()[:, None]
    lse = torch.logsumexp(logits, dim=1)
    logprobs = logits - lse[:, None]
    # p log p is 0 where p is 0 (logit -inf)
    p_log_p = torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs.clamp(min=-1e6), 0.0)
    return logprobs.gather(1, targets.long()[:, None]).squeeze(1), -p_log_p.sum(1), lse


def policy_loss(
    logprobs: Any,
    old_logprobs: Any,
    advantages: Sequence[float],
    *,
    mask: Sequence[int],
    cu_seqlens: Sequence[int],
    ref_logprobs: Any = None,
    kind: str,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str,
    engine_logprobs: Any = None,
    truncation: float | None = None,
    constant_length: int = 1,
    zero_variance: Sequence[bool] | None = None,
) -> Any:
    """The loss, a float64 scalar differentiable by autograd, one token at a time; ``advantages`` (S,).

    ``logprobs``, ``old_logprobs``, ``ref_logprobs``, ``engine_logprobs``: float64 tensors (N,).
    """
    torch = require("torch", "train", "hiexp.ops.reference")
    sequence_losses = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        tokens = [t for t in range(start, end) if mask[t]]
        if not tokens or (zero_variance is not None and zero_variance[i]):
            continue
        log_ratios = [logprobs[t] - old_logprobs[t] for t in tokens]
        if kind == "gspo":
            # Equation 13: the value is the sequence's mean, the gradient each token's own.
            mean = sum(log_ratios).detach() / len(tokens)
            log_ratios = [mean + x - x.detach() for x in log_ratios]
        losses = []
        for t, log_ratio in zip(tokens, log_ratios, strict=True):
            ratio, advantage = log_ratio.exp(), advantages[i]
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            if kind == "cispo":
                loss = -clipped.detach() * advantage * logprobs[t]
            else:
                loss = -torch.minimum(ratio * advantage, clipped * advantage)
            if clip_dual is not None and advantage < 0:
                loss = torch.minimum(loss, torch.full_like(loss, -clip_dual * advantage))
            if engine_logprobs is not None and truncation is not None:
                loss = loss * (old_logprobs[t] - engine_logprobs[t]).exp().clamp(max=truncation)
            if ref_logprobs is not None:
                d = logprobs[t] - ref_logprobs[t]
                loss = loss + kl_coef * {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[kl_estimator]
            losses.append(loss)
        sequence_losses.append(torch.stack(losses))
    if not sequence_losses:
        return logprobs.sum() * 0
    if aggregation == "token":
        return torch.cat(sequence_losses).mean()
    if aggregation == "sequence":
        return torch.stack([losses.mean() for losses in sequence_losses]).mean()
    return torch.cat(sequence_losses).sum() / (len(sequence_losses) * constant_length)
