"""Weights that correct for an engine whose log-probs differ from the trainer's (truncated importance sampling).

With rho_t = exp(old_t - engine_t) for the tokens t of a rollout of n tokens, and a cap C:

    token_truncate      min(rho_t, C)                                   Yao et al. 2025, "Your efficient RL framework
                                                                        secretly brings you off-policy RL training"
    token_mask          rho_t where rho_t <= C, else 0
    sequence_truncate   min(prod rho, C)
    sequence_mask       prod rho where that is <= C, else 0             Liu et al. 2025, "When speed kills stability"
    geometric_mask      1 where 1/C <= (prod rho)^(1/n) <= C, else 0    the same, rejection by the geometric mean

Masks drop what the engine and the trainer disagree on; truncation keeps it with a bounded weight. The product over a
long rollout has no bias and a huge variance. The weight multiplies the policy term; the KL term does not get it.
"""

from __future__ import annotations

from typing import Any

import torch

# exp(20): beyond it a ratio means a broken rollout; as in hiexp.policy_loss.
_LIMIT = 20.0


def importance_weights(old: Any, engine: Any, cu_seqlens: Any, mode: str, cap: float) -> tuple[Any, Any]:
    """Weights ``(N,)`` and which of them were cut or set to 0, ``(N,)`` bool.

    Args:
        old, engine: (N,) log-probs without gradient.
        cu_seqlens: (S + 1,) offsets of the rollouts.
        mode: see above.
        cap: C, above 0; for geometric_mask at least 1.

    Raises:
        ValueError: an unknown mode, or a cap out of range.
    """
    if mode == "geometric_mask" and cap < 1:
        raise ValueError(f"algorithm.importance_cap: expected at least 1 with 'geometric_mask', got {cap}")
    logs = (old - engine).detach()
    unit, _, action = mode.partition("_")
    if unit in ("sequence", "geometric"):
        counts = cu_seqlens.diff()
        sequence = torch.arange(len(counts), device=logs.device).repeat_interleave(counts)
        sums = logs.new_zeros(len(counts)).index_add(0, sequence, logs)
        logs = (sums / counts.clamp(min=1) if unit == "geometric" else sums)[sequence]
    rho = logs.clamp(-_LIMIT, _LIMIT).exp()
    over = rho > cap
    if unit == "geometric":
        over = over | (rho < 1 / cap)
        return (~over).to(rho.dtype), over
    if unit not in ("token", "sequence") or action not in ("truncate", "mask"):
        raise ValueError(f"algorithm.importance_mode: unknown mode {mode!r}")
    return (rho.clamp(max=cap) if action == "truncate" else rho.masked_fill(over, 0.0)), over
