"""A stored rollout played again: the sampled tokens from the record, everything else made anew, the tokens compared.

It shows that a record is complete: from its question, its snapshot, its searches and its sampled tokens alone every
inserted token comes back. No model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hiexp.agent.engine import Generation, Sampling
from hiexp.agent.record import FinishReason, Rollout
from hiexp.agent.tools import Document, Tool
from hiexp.io import DataError
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.rollout import SearchAgent
    from hiexp.experience.retrieve import Snapshot

# Why the engine's last turn ended, from why the rollout did; turns before it ended at a stop string.
_REASONS: dict[FinishReason, Any] = {"eos": "eos", "max_tokens": "length", "context": "context"}


class _RecordedEngine:
    """An engine and its only session: says the sampled spans of one rollout, one a turn."""

    def __init__(self, rollout: Rollout, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        spans = [slice(span.start, span.end) for span in rollout.spans if span.kind == "sampled"]
        self._last = _REASONS.get(rollout.finish_reason, "stop")
        self._turns = [
            Generation(rollout.token_ids[span], rollout.logprobs[span], "stop" if span != spans[-1] else self._last)
            for span in spans
        ]
        self._started = False

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> _RecordedEngine:
        return self

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        self._started = True

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        if not self._started:
            return []
        self._started = False
        # A turn without tokens leaves no span; it can only be the last one.
        return [(0, self._turns.pop(0) if self._turns else Generation([], [], self._last))]

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        pass

    def release(self, rows: Sequence[int]) -> None:
        pass


class _RecordedFailures:
    """The tool, but a search that failed when the rollout was made fails again."""

    def __init__(self, rollout: Rollout, tool: Tool) -> None:
        self.name, self._tool = tool.name, tool
        # Searches that were answered from the rollout's own earlier result do not reach the tool.
        self._calls = [call for call in rollout.tool_calls if call.status != "duplicate"]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        call = self._calls.pop(0)
        if call.status in ("timeout", "error"):
            raise RuntimeError(call.error)
        return self._tool.search(queries, top_k)


def replay(agent: SearchAgent, rollout: Rollout, question: Question, snapshot: Snapshot | None = None) -> Rollout:
    """``rollout`` made again with the settings, tokenizer and tool of ``agent``; its engine is not asked.

    Args:
        agent: with the settings that the rollout was made with; its tool is usually a
            :class:`hiexp.agent.recorded_tool.RecordedTool`.
        question: the rollout's.
        snapshot: the one it was pinned to, where it was shown experience.

    Raises:
        ValueError: another question or another snapshot.
        DataError: the tokens differ; names the first place and what stood there.
    """
    if rollout.question_id != question.id:
        raise ValueError(f"question: expected {rollout.question_id!r}, the rollout's own, got {question.id!r}")
    given = None if snapshot is None else snapshot.id
    if given != rollout.snapshot_id:
        raise ValueError(f"snapshot: expected {rollout.snapshot_id}, the rollout's own, got {given}")
    again = replace(
        agent,
        engine=_RecordedEngine(rollout, agent.engine.tokenizer, agent.engine.context_length),
        tool=_RecordedFailures(rollout, agent.tool),
        max_tool_seconds=None,
    ).run(
        [question],
        seeds=[rollout.seed],
        snapshot=snapshot,
        with_experience=[bool(rollout.injections)],
        policy_step=rollout.policy_step,
    )[0]
    _compare(rollout, again)
    return again


def _compare(stored: Rollout, again: Rollout) -> None:
    if stored.token_ids == again.token_ids and stored.loss_mask == again.loss_mask:
        return
    pairs = zip(stored.token_ids, again.token_ids, strict=False)
    shorter = min(len(stored.token_ids), len(again.token_ids))
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
    kind = next((span.kind for span in stored.spans if span.start <= place < span.end), "end")
    raise DataError(
        f"rollout {stored.rollout_id}: its replay differs from token {place} on (of {len(stored.token_ids)}, in a span "
        f"of kind {kind!r}); the settings, tokenizer, snapshot or searches are not those it was made with"
    )
