"""What a training step reports: the metric names, how they are computed from rollouts, and the files they go to.

metrics.jsonl holds one line a step with exactly :data:`METRIC_KEYS`, and ``loss/NAME`` for what a registered loss
reports; a value that does not exist in a step (the reward of controls where there are none) is null. Everything but
:data:`TIME_KEYS` is a function of config and seed, as long as servers fail (``tool_errors``, ``tool_retries``) alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.record import FinishReason, Rollout
from hiexp.io import append_lines, atomic_write, read_jsonl

if TYPE_CHECKING:
    from hiexp.rl.trackers import Trackers

# What tool and scorer count by themselves, beside what stands in the rollouts.
SERVICE_KEYS = ("tool_retries", "empty_passages", "scorer_failures")
FINISH_REASONS: tuple[FinishReason, ...] = (
    "answer", "malformed", "max_turns", "max_tokens", "context", "eos", "max_searches", "max_tool_seconds", "cancelled",
)  # fmt: skip
# Seconds and memory: the only values that depend on the machine. Of the rollouts' seconds, prefill and decode are the
# transformers engine's; what is left is tools and the agent's own work. Of the update's, old_logprobs and reference are
# passes without a gradient; a forward ends when the loss is known, the optimiser's hold the clipping of the gradient.
# The clock is the host's: on CUDA a backward is waited for by the next micro-batch's forward or at the end of the last
# one, the optimiser by whatever needs the weights next.
TIME_KEYS = (
    "seconds_rollout", "seconds_prefill", "seconds_decode", "seconds_score", "seconds_update", "seconds_old_logprobs",
    "seconds_reference", "seconds_forward", "seconds_backward", "seconds_optimiser", "seconds_sync", "seconds_step",
    "peak_rss_mb", "peak_cuda_mb", "oom_retries",
)  # fmt: skip
METRIC_KEYS = (
    "step", "reward_mean", "reward_std", "advantage_var_raw", "zero_variance_share", "nan_rewards", "grad_norm", "loss",
    "kl_ref", "kl_coef", "kl_penalty", "approx_kl", "clip_fraction", "clip_fraction_low", "clip_fraction_high",
    "entropy", "engine_mismatch", "engine_mismatch_max", "engine_mismatch_share", "importance_cut", "sync_gap_mean",
    "sync_gap_max", "staleness", "lr",
    "overlong_penalty", "filtered_groups", "sampling_rounds", "replaced_groups", "trained_rollouts", "trained_tokens",
    "searches_per_answer", "response_tokens", "response_tokens_max", "truncated_share",
    "prompt_tokens", "experience_hit_rate_E1", "experience_hit_rate_E2", "experience_hit_rate_E3",
    "experience_hit_rate_start", "experience_dropped", "reward_with_experience", "reward_without_experience", "uplift",
    "uplift_stderr", *(f"finish_{reason}" for reason in FINISH_REASONS), "tool_errors",
    "duplicate_searches", "engine_restarts", *SERVICE_KEYS, "snapshot_id", "hek_E1", "hek_E2", "hek_E3", *TIME_KEYS,
)  # fmt: skip


def mean(values: Sequence[float] | np.ndarray[Any, Any]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return float(np.mean(values)) if len(values) else None


def rollout_metrics(rollouts: Sequence[Rollout], with_experience: Sequence[bool]) -> dict[str, Any]:
    """Behaviour of the agent in one step. Injections of turn 0 stand in the prompt, later ones in tool responses.

    ``experience_hit_rate_start``, ``_E2``, ``_E3``: share of rollouts allowed experience that were shown any, any E2,
    any E3 with the question. ``experience_hit_rate_E1``: share of their tool calls that came back with an E1 entry.
    ``experience_dropped``: share of the retrieved entries that experience dropout left out.
    ``truncated_share``: rollouts that ran out of tokens or context.
    """
    shown = [rollout for rollout, allowed in zip(rollouts, with_experience, strict=True) if allowed]
    finishes = Counter(rollout.finish_reason for rollout in rollouts)
    calls = [call for rollout in rollouts for call in rollout.tool_calls]
    sampled = [sum(rollout.loss_mask) for rollout in rollouts]
    e1_turns = sum(len({entry.turn for entry in rollout.injections if entry.turn > 0}) for rollout in shown)
    shown_calls = sum(len(rollout.tool_calls) for rollout in shown)
    entries, dropped = sum(len(one.injections) for one in shown), sum(len(one.dropped) for one in shown)
    return {
        "searches_per_answer": len(calls) / len(rollouts),
        "response_tokens": mean(sampled),
        "response_tokens_max": max(sampled),
        "truncated_share": (finishes["max_tokens"] + finishes["context"]) / len(rollouts),
        "prompt_tokens": mean([len(rollout.token_ids) - n for rollout, n in zip(rollouts, sampled, strict=True)]),
        "experience_hit_rate_E1": e1_turns / shown_calls if shown_calls else None,
        **{f"experience_hit_rate_{level}": _start_share(shown, level) for level in ("E2", "E3")},
        "experience_hit_rate_start": _start_share(shown, None),
        "experience_dropped": dropped / (entries + dropped) if entries + dropped else None,
        **{f"finish_{reason}": finishes[reason] / len(rollouts) for reason in FINISH_REASONS},
        "tool_errors": sum(call.status in ("timeout", "error") for call in calls),
        "duplicate_searches": sum(call.status == "duplicate" for call in calls),
        "engine_restarts": sum(rollout.engine_restarts for rollout in rollouts),
    }


def _start_share(shown: Sequence[Rollout], level: str | None) -> float | None:
    return mean([any(one.turn == 0 and level in (None, one.level) for one in rollout.injections) for rollout in shown])


def uplift(rewards: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], allowed: np.ndarray[Any, Any]) -> Any:
    """What experience adds to the reward and the standard error of that, each None where it cannot be told.

    The mean over groups with both arms of (mean reward with - mean reward without): how hard a question is cancels out.
    """
    differences = []
    for group in np.unique(groups):
        inside = (groups == group) & ~np.isnan(rewards)
        if (inside & allowed).any() and (inside & ~allowed).any():
            differences.append(rewards[inside & allowed].mean() - rewards[inside & ~allowed].mean())
    count = len(differences)
    return mean(differences), float(np.std(differences, ddof=1) / np.sqrt(count)) if count > 1 else None


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
    difference, error = uplift(rewards, groups, allowed)
    return {
        "reward_mean": mean(rewards[valid]),
        "reward_std": float(np.std(rewards[valid])) if valid.any() else None,
        "advantage_var_raw": mean(np.concatenate(deviations) ** 2) if deviations else None,
        "zero_variance_share": mean([not values.any() for values in deviations]),
        "nan_rewards": int((~valid).sum()),
        "reward_with_experience": mean(rewards[valid & allowed]),
        "reward_without_experience": mean(rewards[valid & ~allowed]),
        "uplift": difference,
        "uplift_stderr": error,
    }


class ServiceCounts:
    """What the tool and the task's scorer, in this process, counted since this was made.

    ``tool_retries``: requests sent again after a time-out or a passing error. ``empty_passages``: passages without text
    that a server sent. ``scorer_failures``: answers that broke a limit of the maths checker and scored 0.
    """

    def __init__(self, tool: Any, task: Any) -> None:
        self._tool, self._task = tool, task
        self._before = self._totals()

    def read(self) -> dict[str, int]:
        """The counts so far."""
        return {key: value - self._before[key] for key, value in self._totals().items()}

    def _totals(self) -> dict[str, int]:
        totals = dict.fromkeys(SERVICE_KEYS, 0)
        totals["scorer_failures"] = getattr(self._task, "scorer_failures", 0)
        tool = self._tool
        while tool is not None:  # caches and recordings hold the tool that they ask as theirs
            totals["tool_retries"] += getattr(getattr(tool, "client", None), "retried", 0)
            totals["empty_passages"] += getattr(tool, "empty_passages", 0)
            tool = getattr(tool, "tool", None)
        return totals


class MetricsLog:
    """Appends steps to ``metrics.jsonl`` and the ``trackers``; on resume drops what the checkpoint forgot.

    Without ``writes`` (ranks other than 0) the rows are kept in memory only.
    """

    def __init__(
        self, directory: Path, *, resume_step: int, trackers: Trackers | None = None, writes: bool = True
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        self._trackers, self._writes = trackers, writes
        if writes:
            atomic_write(self.path, "".join(map(_line, self.rows)))

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one step; keys in the order of METRIC_KEYS, absent ones as null, then those of a registered loss."""
        ordered: dict[str, Any] = {key: row.get(key) for key in METRIC_KEYS}
        ordered |= {key: value for key, value in row.items() if key.startswith("loss/")}
        if self._writes:
            append_lines(self.path, _line(ordered))
        self.rows.append(ordered)
        self.publish("train", ordered, ordered["step"])
        return ordered

    def publish(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """Numbers among ``values`` to the trackers under ``prefix/``."""
        if self._trackers is not None:
            self._trackers.publish(prefix, values, step)

    def close(self) -> None:
        """Flush the trackers."""
        if self._trackers is not None:
            self._trackers.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out. No file gives no rows."""
    return [row for _, row in read_jsonl(path, ["step"], torn_tail=True)] if path.is_file() else []


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
