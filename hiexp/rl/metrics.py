"""What a training step reports: the metric names, how they are computed from rollouts, and the files they go to.

metrics.jsonl holds one line a step with exactly :data:`METRIC_KEYS`; a value that does not exist in a step (the reward
of controls where there are none) is null. Everything but :data:`TIME_KEYS` is a function of config and seed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.agent.record import FinishReason, Rollout
from hiexp.io import atomic_write, read_jsonl

FINISH_REASONS: tuple[FinishReason, ...] = (
    "answer", "malformed", "max_turns", "max_tokens", "context", "eos", "max_searches", "max_tool_seconds", "cancelled",
)  # fmt: skip
TIME_KEYS = ("seconds_rollout", "seconds_score", "seconds_update", "seconds_step")
METRIC_KEYS = (
    "step", "reward_mean", "reward_std", "advantage_var_raw", "zero_variance_share", "nan_rewards", "grad_norm", "loss",
    "kl_ref", "approx_kl", "clip_fraction", "entropy", "engine_mismatch", "lr", "searches_per_answer",
    "response_tokens", "prompt_tokens", "experience_hit_rate_E1", "experience_hit_rate_start", "reward_with_experience",
    "reward_without_experience", *(f"finish_{reason}" for reason in FINISH_REASONS), "tool_errors",
    "duplicate_searches", "engine_restarts", "snapshot_id",
    "hek_E1", "hek_E2", "hek_E3", *TIME_KEYS,
)  # fmt: skip


def mean(values: Sequence[float] | np.ndarray[Any, Any]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return float(np.mean(values)) if len(values) else None


def rollout_metrics(rollouts: Sequence[Rollout], with_experience: Sequence[bool]) -> dict[str, Any]:
    """Behaviour of the agent in one step. Injections of turn 0 stand in the prompt, later ones in tool responses.

    ``experience_hit_rate_start``: share of rollouts allowed experience that were shown any with the question.
    ``experience_hit_rate_E1``: share of their tool calls that came back with an E1 entry.
    """
    shown = [rollout for rollout, allowed in zip(rollouts, with_experience, strict=True) if allowed]
    finishes = Counter(rollout.finish_reason for rollout in rollouts)
    calls = [call for rollout in rollouts for call in rollout.tool_calls]
    sampled = [sum(rollout.loss_mask) for rollout in rollouts]
    e1_turns = sum(len({entry.turn for entry in rollout.injections if entry.turn > 0}) for rollout in shown)
    shown_calls = sum(len(rollout.tool_calls) for rollout in shown)
    return {
        "searches_per_answer": len(calls) / len(rollouts),
        "response_tokens": mean(sampled),
        "prompt_tokens": mean([len(rollout.token_ids) - n for rollout, n in zip(rollouts, sampled, strict=True)]),
        "experience_hit_rate_E1": e1_turns / shown_calls if shown_calls else None,
        "experience_hit_rate_start": mean(
            [any(entry.turn == 0 for entry in rollout.injections) for rollout in shown],
        ),
        **{f"finish_{reason}": finishes[reason] / len(rollouts) for reason in FINISH_REASONS},
        "tool_errors": sum(call.status in ("timeout", "error") for call in calls),
        "duplicate_searches": sum(call.status == "duplicate" for call in calls),
        "engine_restarts": sum(rollout.engine_restarts for rollout in rollouts),
    }


def reward_metrics(
    rewards: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], with_experience: Sequence[bool]
) -> dict[str, Any]:
    """Statistics of the rewards ``(N,)`` of groups ``(N,)``; NaN rewards are counted and left out of the rest.

    ``advantage_var_raw`` is the mean of (r - group mean)^2, before the division by the group's standard deviation that
    would make it constant.
    """
    valid = ~np.isnan(rewards)
    allowed = np.asarray(with_experience, dtype=bool)
    deviations = [rewards[valid & (groups == group)] for group in np.unique(groups)]
    deviations = [values - values.mean() for values in deviations if len(values)]
    return {
        "reward_mean": mean(rewards[valid]),
        "reward_std": float(np.std(rewards[valid])) if valid.any() else None,
        "advantage_var_raw": mean(np.concatenate(deviations) ** 2) if deviations else None,
        "zero_variance_share": mean([not values.any() for values in deviations]),
        "nan_rewards": int((~valid).sum()),
        "reward_with_experience": mean(rewards[valid & allowed]),
        "reward_without_experience": mean(rewards[valid & ~allowed]),
    }


class MetricsLog:
    """Appends steps to ``metrics.jsonl`` and, where wanted, TensorBoard; on resume drops what the checkpoint forgot."""

    def __init__(self, directory: Path, *, resume_step: int, tensorboard: bool) -> None:
        self.path = directory / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        atomic_write(self.path, "".join(map(_line, self.rows)))
        self._board: Any = None
        if tensorboard:
            require("tensorboard", "train", "run.tensorboard")
            board = require("torch.utils.tensorboard", "train", "run.tensorboard")
            self._board = board.SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one step; keys in the order of METRIC_KEYS, absent ones as null."""
        ordered: dict[str, Any] = {key: row.get(key) for key in METRIC_KEYS}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(_line(ordered))
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(ordered)
        self.scalars("train", ordered, ordered["step"])
        return ordered

    def scalars(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """Numbers among ``values`` to TensorBoard under ``prefix/``."""
        if self._board is None:
            return
        for key, value in values.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(f"{prefix}/{key}", value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out. No file gives no rows."""
    return [row for _, row in read_jsonl(path, ["step"], torn_tail=True)] if path.is_file() else []


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
