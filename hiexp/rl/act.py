"""Rollouts of the current policy: the search agent with the run's limits, some rows at a time, seeded by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.demonstration import with_demonstration
from hiexp.agent.engine import Engine, Sampling
from hiexp.agent.protocol import get_dialect
from hiexp.agent.record import Rollout
from hiexp.agent.rollout import SearchAgent, count_up
from hiexp.progress import track
from hiexp.rl.config import TrainConfig
from hiexp.rl.distributed import Ranks
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot


@dataclass(frozen=True, slots=True)
class ActedStep:
    """What acting gives to learning: N rollouts in rows of whole groups, with their rewards.

    Attributes:
        questions: N questions, row i's own.
        rollouts: N rollouts, scored.
        rewards: (N,) float64, NaN where the scorer gave NaN.
        groups: (N,) int64, rows of one question share a number.
        with_experience: N booleans, whether the row was allowed experience.
        seconds: wall time by metric name (``seconds_rollout``, ``seconds_score``).
        engine: metrics of the weights that acted (``staleness``; ``sync_gap_mean``, ... of an engine of its own).
    """

    questions: Sequence[Question]
    rollouts: list[Rollout]
    rewards: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]
    with_experience: Sequence[bool]
    seconds: dict[str, float]
    engine: dict[str, Any] = field(default_factory=dict)


class Actor:
    """Answers questions with ``engine``; ``tool`` searches for batches that bring no tool of their own.

    Several ``ranks`` answer their share each and exchange the rollouts.
    """

    def __init__(self, engine: Engine, tool: Tool, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.engine, self.tool, self.config = engine, tool, config
        self.ranks = Ranks() if ranks is None else ranks

    def run(
        self,
        questions: Sequence[Question],
        *,
        tool: Tool | None,
        snapshot: Snapshot | None,
        with_experience: Sequence[bool],
        indices: Sequence[int],
        seeds: Sequence[int],
        policy_step: int,
        sampling: Sampling,
        label: str,
    ) -> list[Rollout]:
        """One rollout per row, ``rollout.batch_rows`` rows at a time, with a progress bar named ``label``.

        Raises:
            ValueError: a question twice with one index: rollout ids, which groups are told apart by, would repeat.
            RankError: another rank failed at its share.
        """
        counts = Counter((question.id, index) for question, index in zip(questions, indices, strict=True))
        for (identifier, _), count in counts.items():
            if count > 1:
                raise ValueError(f"question {identifier!r}: expected different question ids in a step, got it twice")
        size = self.config.rollout.batch_rows
        mine = self.ranks.share([question.id for question in questions])

        def answer_mine() -> list[Rollout]:
            agent = self._agent(tool if tool is not None else self.tool, sampling)
            rollouts: list[Rollout] = []
            for first in track(range(mine.start, mine.stop, size), label):
                rows = slice(first, min(first + size, mine.stop))
                rollouts += agent.run(
                    questions[rows],
                    seeds=seeds[rows],
                    snapshot=snapshot,
                    with_experience=with_experience[rows],
                    policy_step=policy_step,
                    indices=indices[rows],
                )
            return rollouts

        return [rollout for part in self.ranks.together(answer_mine) for rollout in part]

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raise ValueError for a question whose prompt leaves no room in the limits (names the question)."""
        self._agent(self.tool, Sampling()).check_prompts(questions)

    def answer(self, questions: Sequence[Question], tool: Any, snapshot: Any, policy_step: int) -> list[Rollout]:
        """One rollout per row for an evaluation, with ``snapshot`` or, where it is None, without experience.

        A question that comes several times is answered with other seeds each time.
        """
        count = len(questions)
        places = {identifier: place for place, identifier in enumerate(dict.fromkeys(one.id for one in questions))}
        indices = count_up(questions)
        return self.run(
            questions,
            tool=tool,
            snapshot=snapshot,
            with_experience=[snapshot is not None] * count,
            indices=indices,
            # Step 0 is no training step: the evaluations of all steps share their seeds.
            seeds=[
                rollout_seed(self.config.run.seed, 0, places[one.id], index)
                for one, index in zip(questions, indices, strict=True)
            ],
            policy_step=policy_step,
            sampling=Sampling(self.config.evaluation.temperature, 1.0),
            label=f"evaluation {'without' if snapshot is None else 'with'} HEK",
        )

    def _agent(self, tool: Tool, sampling: Sampling) -> SearchAgent:
        limits, experience = self.config.rollout, self.config.experience
        dialect = get_dialect(limits.dialect)
        return SearchAgent(
            self.engine,
            tool,
            dialect=with_demonstration(dialect) if limits.demonstration else dialect,
            max_turns=limits.max_turns,
            max_new_tokens=limits.max_new_tokens,
            max_total_tokens=limits.max_total_tokens,
            max_document_tokens=limits.max_document_tokens,
            top_k=self.config.tool.top_k,
            tool_timeout_s=self.config.tool.timeout_s,
            e1_threshold=experience.e1_threshold,
            start_levels=experience.start_levels,
            start_top_k=experience.start_top_k,
            sampling=sampling,
        )


def rollout_seed(seed: int, step: int, group: int, index: int) -> int:
    """Sampling seed of one rollout: a hash of its place in the run, 63 bits."""
    return int(np.random.SeedSequence([seed, step, group, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
