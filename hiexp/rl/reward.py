"""Questions in, rewards out: what a task must offer the trainer, and how rollouts are judged.

Outcome reward only, as in the paper: one score of the final answer. Rollouts that gave no answer in the turn grammar
get ``task.malformed_reward`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hiexp.agent.record import Rollout
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.tasks.scorers import AnswerScorer


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """Questions that are answered together; ``tool`` searches their world, None means the trainer's own tool."""

    questions: Sequence[Question]
    tool: Tool | None = None


class Task(Protocol):
    """What the trainer needs of a task. All methods must be functions of their arguments alone (exact resume)."""

    def training(self, step: int, count: int) -> TaskBatch:
        """The ``count`` questions of training step ``step`` (from 1)."""
        ...

    def evaluation(self) -> Sequence[TaskBatch]:
        """The evaluation questions, the same at every call; may be empty."""
        ...

    def score(self, question: Question, answer: str | None) -> Mapping[str, float]:
        """Scores of an answer; the one named by ``task.metric`` is the reward."""
        ...


class QuestionTask:
    """A task over lists of questions: training questions in a new random order every epoch, without replacement.

    An epoch is as many whole steps as the questions fill; those left over, others in every epoch, sit it out. So no
    step asks a question twice.

    Args:
        training: questions to train on.
        evaluation: questions to evaluate on.
        scorer: ``score(prediction, golds) -> {metric: value}``.
        seed: decides the order.

    Raises:
        ValueError: a question without gold answers (its id is named), or no training questions.
    """

    def __init__(
        self, training: Sequence[Question], evaluation: Sequence[Question], scorer: AnswerScorer, seed: int
    ) -> None:
        if not training:
            raise ValueError("training: expected at least one question, got none")
        for question in [*training, *evaluation]:
            if not question.golden_answers:
                raise ValueError(f"question {question.id!r} has no gold answers; it can be neither trained nor scored")
        self.questions, self._evaluation = list(training), list(evaluation)
        self._scorer, self._seed = scorer, seed

    @property
    def scorer_failures(self) -> int:
        """Answers that broke a limit of the scorer so far, where it has limits (maths)."""
        return int(getattr(self._scorer, "failures", 0))

    def training(self, step: int, count: int) -> TaskBatch:
        """The ``count`` questions of one step of its epoch, all different.

        Raises:
            ValueError: there are fewer than ``count``.
        """
        n = len(self.questions)
        if count > n:
            raise ValueError(f"run.questions_per_step: expected at most the {n} training questions, got {count}")
        epoch, place = divmod(step - 1, n // count)
        order = np.random.default_rng([self._seed, epoch]).permutation(n)
        return TaskBatch([self.questions[i] for i in order[place * count : (place + 1) * count]])

    def evaluation(self) -> Sequence[TaskBatch]:
        """All evaluation questions in their own order."""
        return [TaskBatch(self._evaluation)] if self._evaluation else []

    def score(self, question: Question, answer: str | None) -> Mapping[str, float]:
        """Scores against the question's gold answers."""
        return self._scorer.score(answer, question.golden_answers)


def score_rollouts(
    rollouts: Sequence[Rollout], questions: Sequence[Question], task: Task, metric: str, malformed_reward: float
) -> np.ndarray[Any, Any]:
    """Set ``scores`` and ``reward`` of rollout i, an answer to question i; return the rewards ``(N,)`` float64.

    A NaN or infinite reward is returned as it is and stored as None, NaN with ``scores["nan_reward"] = 1``, and scores
    that are not finite are left out: files stay valid JSON.

    Raises:
        ValueError: the task gives no score named ``metric``.
    """
    rewards = np.empty(len(rollouts), dtype=np.float64)
    for i, (rollout, question) in enumerate(zip(rollouts, questions, strict=True)):
        scores = dict(task.score(question, rollout.answer))
        if metric not in scores:
            raise ValueError(f"task.metric: expected one of the task's scores {sorted(scores)}, got {metric!r}")
        rewards[i] = malformed_reward if rollout.answer is None else scores[metric]
        rollout.scores = {name: float(value) for name, value in scores.items() if np.isfinite(value)}
        rollout.reward = float(rewards[i]) if np.isfinite(rewards[i]) else None
        if np.isnan(rewards[i]):
            rollout.scores["nan_reward"] = 1.0
    return rewards


def check_rewards(rewards: np.ndarray[Any, Any], rollouts: Sequence[Rollout], policy: str) -> None:
    """Raise for NaN rewards under the policy ``"raise"``, and for infinite ones always, naming the first rollout."""
    bad = np.isinf(rewards) | (np.isnan(rewards) & (policy == "raise"))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"rollout {rollouts[first].rollout_id}: expected a finite reward, got {rewards[first]} "
            f"({int(bad.sum())} of {len(rewards)} rollouts of this step); the scorer is at fault. "
            "algorithm.nan_reward: zero leaves NaN rollouts out of the update"
        )
