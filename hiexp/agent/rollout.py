"""Rollouts: the agent answers questions in turns, searches in between, and is shown experience (paper, stage 4).

E2/E3 entries stand in the prompt, the best E1 entry for a query in the tool response. How a conversation grows is in
conversation.py, how many run at once in driver.py; here are the agent's settings, the checks, and the way to a readable
trajectory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hiexp.agent.driver import Cancel, Driver
from hiexp.agent.engine import Engine, Sampling
from hiexp.agent.prompts import Writer
from hiexp.agent.protocol import Dialect, get_dialect
from hiexp.agent.record import Rollout
from hiexp.agent.tools import Tool
from hiexp.agent.trajectory import Step, Trajectory
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot


@dataclass(slots=True)
class SearchAgent:
    """An agent that answers questions with an engine and a search tool.

    Attributes:
        engine: what samples.
        tool: what searches; failures are recorded and the rollout goes on.
        dialect: name of the turn grammar, or a :class:`Dialect`.
        max_turns: most sampled turns; a search in the last one is not carried out.
        max_new_tokens: most tokens sampled in a turn.
        max_total_tokens: most tokens of a rollout, prompt and documents included; None: the engine's context.
        max_document_tokens: most tokens of the documents of one tool response; the last documents are left out where
            they do not fit, and only a single one is cut, between words.
        max_searches: most searches, repeated ones included; a further one ends the rollout. None: no limit but turns.
        max_sampled_tokens: most sampled tokens of a rollout; None: no limit but the others.
        max_tool_seconds: a search is not carried out any more when the earlier ones took this long; None: no limit.
            With it the clock decides where a rollout ends, so that runs differ.
        top_k: documents per search.
        tool_timeout_s: seconds after which a search counts as failed.
        remote_calls: most searches at once of a tool that says ``remote = True``; other tools are asked one batch at a
            time.
        batch_rows: most rollouts in flight; None: all. No influence on results but rounding.
        engine_retries: how often a rollout goes on from its tokens after its engine died.
        e1_threshold: least similarity of an E1 entry to a query; None: the calibrated one of the snapshot.
        start_levels, start_top_k: which and how many entries stand in the prompt (paper: E2 and E3, 5).
        sampling: temperature and nucleus.
        instructions: whether the prompt explains the grammar (not needed by a policy trained on it).
        chat_template: use the tokenizer's; None: where it has one and the dialect wants it.
    """

    engine: Engine
    tool: Tool
    dialect: str | Dialect = "hiexp"
    max_turns: int = 4
    max_new_tokens: int = 256
    max_total_tokens: int | None = None
    max_document_tokens: int = 1024
    top_k: int = 3
    max_searches: int | None = None
    max_sampled_tokens: int | None = None
    max_tool_seconds: float | None = None
    tool_timeout_s: float = 10.0
    remote_calls: int = 16
    batch_rows: int | None = None
    engine_retries: int = 2
    e1_threshold: float | None = None
    start_levels: Sequence[str] = ("E2", "E3")
    start_top_k: int = 5
    sampling: Sampling = field(default_factory=Sampling)
    instructions: bool = True
    chat_template: bool | None = None

    def __post_init__(self) -> None:
        least = {
            **dict.fromkeys(("max_turns", "max_new_tokens", "max_document_tokens", "top_k", "remote_calls"), 1),
            **dict.fromkeys(("max_sampled_tokens", "batch_rows"), 1),
            **dict.fromkeys(("max_searches", "engine_retries"), 0),
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in ("tool_timeout_s", "max_tool_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number of seconds, got {value}")

    def run(
        self,
        questions: Sequence[Question],
        *,
        seeds: Sequence[int],
        snapshot: Snapshot | None = None,
        with_experience: Sequence[bool] | None = None,
        policy_step: int = 0,
        indices: Sequence[int] | None = None,
        cancel: Cancel | None = None,
    ) -> list[Rollout]:
        """The rollouts of :meth:`stream`, whose arguments it takes, in the order of the questions."""
        driver = self._driver(questions, seeds, snapshot, with_experience, policy_step, indices, cancel)
        done = dict(driver.stream()) if driver is not None else {}
        return [done[place] for place in range(len(questions))]

    def stream(
        self,
        questions: Sequence[Question],
        *,
        seeds: Sequence[int],
        snapshot: Snapshot | None = None,
        with_experience: Sequence[bool] | None = None,
        policy_step: int = 0,
        indices: Sequence[int] | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[Rollout]:
        """One rollout per question (repeat a question for a group), each as soon as it ends.

        Of the experience for a prompt the lowest-ranked lines are left out where they do not fit the limit.

        Args:
            seeds: one per row; equal seeds, weights, snapshot and tool give equal rollouts.
            snapshot: experience the rollouts are pinned to.
            with_experience: per row; False makes a control rollout that is shown nothing. None: all are shown.
            policy_step: training step of the policy, for the record.
            indices: index of each row within its group; None counts the rows of each question.
            cancel: an event, or a function that says True, ends the rollouts that are not over: they come last, as far
                as they got, with the finish reason ``cancelled``. It is looked at between steps of the engine.

        Raises:
            ValueError: lengths that differ, or a prompt that leaves no room in the context (names the question);
                before anything runs.
            EngineError: the engine died on a rollout more than ``engine_retries`` times.
        """
        driver = self._driver(questions, seeds, snapshot, with_experience, policy_step, indices, cancel)
        return iter(()) if driver is None else (rollout for _, rollout in driver.stream())

    def _driver(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        snapshot: Snapshot | None,
        with_experience: Sequence[bool] | None,
        policy_step: int,
        indices: Sequence[int] | None,
        cancel: Cancel | None,
    ) -> Driver | None:
        """The driver with its prompts written; None without questions."""
        for name, values in (("seeds", seeds), ("with_experience", with_experience), ("indices", indices)):
            if values is not None and len(values) != len(questions):
                raise ValueError(f"{name}: expected {len(questions)} values, one a question, got {len(values)}")
        if not questions:
            return None
        dialect, snapshot_id = get_dialect(self.dialect).name, None if snapshot is None else snapshot.id
        places = count_up(questions) if indices is None else indices
        rollouts = [
            Rollout(
                rollout_id=f"{question.id}/{policy_step}/{index}", question_id=question.id, question=question.text,
                token_ids=[], loss_mask=[], logprobs=[], spans=[], injections=[], tool_calls=[],
                snapshot_id=snapshot_id, seed=int(seed), policy_step=policy_step, dialect=dialect,
                finish_reason="cancelled", answer=None,
            )
            for question, seed, index in zip(questions, seeds, places, strict=True)
        ]  # fmt: skip
        driver = Driver(self, snapshot, cancel)
        driver.write_prompts(
            questions, rollouts, [True] * len(questions) if with_experience is None else with_experience
        )
        return driver

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raise ValueError for a question whose prompt, without experience, leaves no room (names the question)."""
        Writer(self).check_prompts(questions)


def count_up(questions: Sequence[Question]) -> list[int]:
    """How often the question of each row came before."""
    seen: Counter[str] = Counter()
    indices = []
    for question in questions:
        indices.append(seen[question.id])
        seen[question.id] += 1
    return indices


def to_trajectory(rollout: Rollout, question: Question, correct: bool | None) -> Trajectory:
    """The readable side of a rollout, for reflection; ``correct`` is the judged outcome."""
    if rollout.question_id != question.id:
        raise ValueError(f"question: expected {rollout.question_id!r}, the rollout's own, got {question.id!r}")
    return Trajectory(
        rollout_id=rollout.rollout_id,
        question_id=question.id,
        question=question.text,
        golden_answers=tuple(question.golden_answers),
        steps=tuple(Step(kind, text) for kind, text in rollout.steps),  # type: ignore[arg-type]
        answer=rollout.answer,
        correct=correct,
        policy_step=rollout.policy_step,
    )
