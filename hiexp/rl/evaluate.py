"""Evaluation with and without the HEK: two different results, always reported side by side (paper.md's trap)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.record import Rollout
from hiexp.rl.metrics import mean
from hiexp.rl.reward import Task, TaskBatch, check_rewards, score_rollouts
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot

# (questions, tool of their world or None, snapshot or None) -> one rollout per question.
Act = Callable[[Sequence[Question], Any, Any], list[Rollout]]


def evaluation_batches(task: Task, limit: int) -> list[TaskBatch]:
    """The first ``limit`` evaluation questions, still beside the tool of their world."""
    batches, left = [], limit
    for batch in task.evaluation():
        if left > 0 and batch.questions:
            batches.append(TaskBatch(batch.questions[:left], batch.tool))
            left -= len(batches[-1].questions)
    return batches


@dataclass(frozen=True, slots=True)
class Arm:
    """Rollouts of one way to answer, question by question, ``samples`` of each; rewards (N,); wall time.

    ``usage``: requests and tokens of a server whose tokens are not those of the rollouts (a chat API), else empty.
    """

    rollouts: list[Rollout]
    rewards: np.ndarray[Any, Any]
    samples: int
    seconds: float
    usage: Mapping[str, int] = field(default_factory=dict)

    def by_question(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every score as (questions, samples)."""
        names = sorted({name for rollout in self.rollouts for name in rollout.scores})
        scores = {name: np.array([rollout.scores.get(name, 0.0) for rollout in self.rollouts]) for name in names}
        return {name: values.reshape(-1, self.samples) for name, values in scores.items()}


def run_arm(
    act: Act,
    task: Task,
    batches: Sequence[TaskBatch],
    snapshot: Snapshot | None,
    *,
    metric: str,
    malformed_reward: float,
) -> Arm:
    """Answer every question once, with ``snapshot`` or, where it is None, without experience."""
    begin = time.perf_counter()
    questions = [question for batch in batches for question in batch.questions]
    rollouts = [rollout for batch in batches for rollout in act(batch.questions, batch.tool, snapshot)]
    rewards = score_rollouts(rollouts, questions, task, metric, malformed_reward)
    check_rewards(rewards, rollouts, "zero")
    return Arm(rollouts, rewards, 1, time.perf_counter() - begin)


def evaluate(
    act: Act,
    task: Task,
    batches: Sequence[TaskBatch],
    snapshot: Snapshot | None,
    *,
    metric: str,
    malformed_reward: float,
) -> dict[str, dict[str, float | int | None] | None]:
    """``{"without_hek": summary, "with_hek": summary or None}``; see :func:`summarise`."""

    def arm(seen: Snapshot | None) -> dict[str, float | int | None]:
        done = run_arm(act, task, batches, seen, metric=metric, malformed_reward=malformed_reward)
        return summarise(done.rollouts, done.rewards)

    return {"without_hek": arm(None), "with_hek": arm(snapshot) if snapshot is not None else None}


def summarise(rollouts: Sequence[Rollout], rewards: np.ndarray[Any, Any]) -> dict[str, float | int | None]:
    """Mean of every score, of the reward (NaN rewards count as 0) and of searches per answer, over n rollouts."""
    names = sorted({name for rollout in rollouts for name in rollout.scores})
    means = {name: mean([rollout.scores.get(name, 0.0) for rollout in rollouts]) for name in names}
    return {
        **means,
        "reward": mean(np.nan_to_num(rewards)),
        "searches_per_answer": mean([len(rollout.tool_calls) for rollout in rollouts]),
        "answered": mean([rollout.finish_reason == "answer" for rollout in rollouts]),
        "n": len(rollouts),
    }
