"""Rollouts of the current policy: the search agent with the run's limits, seeded by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.demonstration import with_demonstration
from hiexp.agent.engine import Engine, Sampling
from hiexp.agent.protocol import get_dialect
from hiexp.agent.record import Rollout
from hiexp.agent.rollout import SearchAgent, count_up
from hiexp.progress import track
from hiexp.rl.config import TrainConfig
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot


class Actor:
    """Answers questions with ``engine``; ``tool`` searches for batches that bring no tool of their own."""

    def __init__(self, engine: Engine, tool: Tool, config: TrainConfig) -> None:
        self.engine, self.tool, self.config = engine, tool, config

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
        """One rollout per row, ``rollout.batch_rows`` in flight; a progress bar named ``label`` counts finished ones.

        Raises:
            ValueError: a question twice with one index: rollout ids, which groups are told apart by, would repeat.
        """
        counts = Counter((question.id, index) for question, index in zip(questions, indices, strict=True))
        for (identifier, _), count in counts.items():
            if count > 1:
                raise ValueError(f"question {identifier!r}: expected different question ids in a step, got it twice")
        agent = self._agent(tool if tool is not None else self.tool, sampling)
        stream = agent.stream(
            questions,
            seeds=seeds,
            snapshot=snapshot,
            with_experience=with_experience,
            policy_step=policy_step,
            indices=indices,
        )
        done = {rollout.rollout_id: rollout for rollout in track(stream, label, len(questions))}
        return [
            done[f"{question.id}/{policy_step}/{index}"] for question, index in zip(questions, indices, strict=True)
        ]

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
            max_searches=limits.max_searches,
            max_sampled_tokens=limits.max_sampled_tokens,
            max_tool_seconds=limits.max_tool_seconds,
            batch_rows=limits.batch_rows,
            remote_calls=limits.remote_calls,
            engine_retries=limits.engine_retries,
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
