"""From rewards to advantages: length penalty, KL in the reward, group filters, advantages, and who is trained on.

    length penalty   0 up to L - B sampled tokens, -p (n - (L - B)) / B up to L, -p beyond; L the longest length, B the
                     buffer, p the penalty                                         DAPO, arXiv:2503.14476, eq. 13
    KL in reward     r - beta * sum_t (log pi_old - log pi_ref)                    RLOO, arXiv:2402.14740, eq. 2
    filters          groups that teach little leave the update, KL term included   DAPO, eq. 11; arXiv:2502.01456

Metrics of rewards stay those of the outcome: what is added here is reported on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiexp.agent.record import FinishReason, Rollout
from hiexp.ops.group_advantage import group_advantage
from hiexp.rl.batch import trainable
from hiexp.rl.config import AlgorithmConfig, CreditConfig
from hiexp.rl.losses import find_loss

Array = np.ndarray[Any, Any]
TRUNCATED: tuple[FinishReason, ...] = ("max_tokens", "context")


@dataclass(frozen=True, slots=True)
class Credit:
    """Result of :func:`assign`: advantages (N,), the rollouts to train on, and metrics."""

    advantages: Array
    trained: list[int]
    metrics: dict[str, Any]


def assign(
    rollouts: Sequence[Rollout],
    rewards: Array,
    groups: Array,
    algorithm: AlgorithmConfig,
    credit: CreditConfig,
    *,
    longest: int,
    kl_penalty: Array | None = None,
) -> Credit:
    """Advantages of N rollouts and which of them are trained on.

    Args:
        rewards: (N,) outcome rewards; NaN ones stay out where ``algorithm.nan_reward`` is zero.
        groups: (N,) labels.
        longest: most tokens a rollout may sample, for ``credit.overlong_length`` null.
        kl_penalty: (N,) taken off the rewards, for ``credit.kl_in_reward``.

    Raises:
        ValueError: a NaN or infinite reward (the row is named).
    """
    penalty = overlong_penalty(rollouts, credit, longest)
    shaped = rewards - penalty
    if kl_penalty is not None:
        shaped = shaped - kl_penalty
    preset = algorithm.advantage_preset or find_loss(algorithm.kind).preset
    result = group_advantage(shaped, groups, preset=preset, nan=algorithm.nan_reward)
    filtered = filtered_groups(rewards, groups, credit)
    out = np.asarray(result.zero_variance) | np.isnan(rewards) | np.isin(groups, filtered)
    if credit.drop_truncated:
        out |= np.array([rollout.finish_reason in TRUNCATED for rollout in rollouts], dtype=bool)
    trained = [i for i, rollout in enumerate(rollouts) if not out[i] and trainable(rollout)]
    metrics = {
        "overlong_penalty": float(penalty.mean()), "filtered_groups": len(filtered),
        "kl_penalty": None if kl_penalty is None else float(kl_penalty.mean()), "trained_rollouts": len(trained),
    }  # fmt: skip
    return Credit(np.asarray(result.advantages), trained, metrics)


def overlong_penalty(rollouts: Sequence[Rollout], credit: CreditConfig, longest: int) -> Array:
    """(N,) float64 in [0, ``overlong_penalty``], 0 everywhere where ``overlong_buffer`` is 0."""
    if credit.overlong_buffer == 0:
        return np.zeros(len(rollouts))
    lengths = np.array([sum(rollout.loss_mask) for rollout in rollouts], dtype=np.float64)
    free = (credit.overlong_length or longest) - credit.overlong_buffer
    share: Array = np.clip((lengths - free) / credit.overlong_buffer, 0.0, 1.0)
    return credit.overlong_penalty * share


def filtered_groups(rewards: Array, groups: Array, credit: CreditConfig) -> list[int]:
    """Labels of the groups that the filters of ``credit`` leave out; NaN rewards do not count."""
    if credit.filter_std is None and credit.filter_low is None and credit.filter_high is None:
        return []
    return [int(label) for label in np.unique(groups) if not _passes(rewards[groups == label], credit)]


def informative_groups(rewards: Array, groups: Array, credit: CreditConfig) -> list[int]:
    """Labels of the groups whose outcome rewards differ and pass the filters, in order of first appearance."""
    labels = list(dict.fromkeys(groups.tolist()))
    return [
        label for label in labels if _differ(rewards[groups == label]) and _passes(rewards[groups == label], credit)
    ]


def _differ(rewards: Array) -> bool:
    finite = rewards[np.isfinite(rewards)]
    return bool(len(finite)) and bool((finite != finite[0]).any())


def _passes(rewards: Array, credit: CreditConfig) -> bool:
    finite = rewards[np.isfinite(rewards)]
    if not len(finite):
        return False
    mean, std = float(finite.mean()), float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    # Equal rewards whose mean is rounded have a deviation of about 1e-17 instead of 0.
    flat = not _differ(finite) or (credit.filter_std is not None and std <= credit.filter_std)
    if credit.filter_std is not None and flat:
        return False
    if credit.filter_low is not None and mean <= credit.filter_low:
        return False
    return credit.filter_high is None or mean < credit.filter_high
