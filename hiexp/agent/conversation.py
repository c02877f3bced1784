"""One conversation between policy and tool: turns, replies, budgets, and the record of every token.

What was sampled is kept as it was sampled, what is inserted is tokenised alone, and mask and spans are written while
that happens; nothing is decoded and tokenised again. Nothing here waits: driver.py asks the engine and the tool.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hiexp.agent.engine import Generation
from hiexp.agent.prompts import Writer
from hiexp.agent.record import FinishReason, Injection, Rollout, Span, SpanKind, ToolCall
from hiexp.agent.tools import ToolResult
from hiexp.agent.truncation import fit_documents
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.rollout import SearchAgent
    from hiexp.experience.retrieve import Hit

_FINISH: dict[str, FinishReason] = {"stop": "malformed", "eos": "eos", "length": "max_tokens", "context": "context"}


class Conversation:
    """The rollout of one question while it grows.

    Attributes:
        rollout: the record.
        shown: whether it is shown experience.
        query: the search it waits for, None while it does not.
        over: whether the rollout has ended; ``rollout.finish_reason`` says why.
    """

    def __init__(self, agent: SearchAgent, writer: Writer, question: Question, rollout: Rollout, shown: bool) -> None:
        self._agent, self._writer, self.question, self.rollout, self.shown = agent, writer, question, rollout, shown
        self.query: str | None = None
        self.over = False
        self.sampled = 0
        self._turns = 0
        self._results: dict[str, ToolResult] = {}  # by normalised query

    def write_prompt(self, entries: Sequence[Hit]) -> None:
        """The prompt with the best of ``entries`` that fit. ValueError where it leaves no room (names the question)."""
        parts, lines = self._writer.fitting(self.rollout.question_id, self.rollout.question, entries)
        self._insert("prompt", parts[0])
        for hit, token_ids in lines:
            self._inject(hit, token_ids, turn=0)
        for part in parts[1:]:
            self._insert("prompt", part)

    def limit(self) -> int:
        """Most tokens of the next turn."""
        agent = self._agent
        left = self._writer.limit - len(self.rollout.token_ids)
        if agent.max_sampled_tokens is not None:
            left = min(left, agent.max_sampled_tokens - self.sampled)
        return min(agent.max_new_tokens, left)

    def end(self, reason: FinishReason) -> None:
        """End the rollout as it is."""
        self.rollout.finish_reason, self.query, self.over = reason, None, True

    # Turns

    def take(self, generation: Generation) -> None:
        """Record what was sampled. Afterwards the rollout is over, or ``query`` is what it searches."""
        rollout, start = self.rollout, len(self.rollout.token_ids)
        self._insert("sampled", generation.token_ids, generation.logprobs)
        self.sampled += len(generation.token_ids)
        self._turns += 1
        text = self._writer.decode(rollout.token_ids[start:])
        action = self._writer.dialect.parse(text)
        if action.thought:
            rollout.steps.append(("think", action.thought))
        if action.kind == "search":
            rollout.steps.append(("query", action.text))
            spent = self._spent()
            if spent is None:
                self.query = action.text
            else:
                self.end(spent)
        elif action.kind == "answer":
            rollout.steps.append(("answer", action.text))
            rollout.answer = action.text
            self.end("answer")
        else:
            full = generation.finish_reason == "length" and len(rollout.token_ids) >= self._writer.context
            self.end("context" if full else _FINISH[generation.finish_reason])

    def _spent(self) -> FinishReason | None:
        """The budget that leaves no search, or None."""
        agent, calls = self._agent, self.rollout.tool_calls
        if self._turns >= agent.max_turns:
            return "max_turns"
        if agent.max_searches is not None and len(calls) >= agent.max_searches:
            return "max_searches"
        if agent.max_sampled_tokens is not None and self.sampled >= agent.max_sampled_tokens:
            return "max_tokens"
        if agent.max_tool_seconds is not None and sum(call.seconds for call in calls) >= agent.max_tool_seconds:
            return "max_tool_seconds"
        return None

    # Replies

    def repeated(self) -> ToolResult | None:
        """The result that ``query`` had earlier in this rollout; None where it is new or failed then."""
        assert self.query is not None
        known = self._results.get(_normalised(self.query))
        return None if known is None else known._replace(status="duplicate", seconds=0.0)

    def reply(self, result: ToolResult, lesson: Hit | None) -> None:
        """Record the tool call and insert its response; the rollout is over where that does not fit."""
        assert self.query is not None
        query, self.query = self.query, None
        writer, rollout = self._writer, self.rollout
        names = [document.id for document in result.documents]
        call = ToolCall(self._turns, query, result.status, result.seconds, names, result.error)
        rollout.tool_calls.append(call)
        if result.status in ("ok", "empty"):
            self._results.setdefault(_normalised(query), result)
        opening, _, closing = map(writer.encode, writer.dialect.enclose(""))
        line = [] if lesson is None else writer.encode(writer.dialect.format_tool_experience(writer.lesson(lesson)))
        # One token must be left to sample, one for documents; the tags and the lesson are never cut.
        room = writer.limit - len(rollout.token_ids) - len(opening) - len(line) - len(closing) - 1
        body, tokens, call.shown = self._body(result, min(room, self._agent.max_document_tokens))
        rollout.steps.append(("documents", body))
        if room < 1:
            self.end("context" if writer.limit == writer.context else "max_tokens")
            return
        self._insert("template", opening)
        self._insert("tool", tokens)
        if lesson is not None:
            self._inject(lesson, line, self._turns)
        self._insert("template", closing)

    def _body(self, result: ToolResult, room: int) -> tuple[str, list[int], int]:
        """Text, tokens and number of the documents, or a word on why there are none, in at most ``room`` tokens."""
        writer = self._writer
        if result.documents:
            fitted = fit_documents(writer.dialect, result.documents, writer.banned, writer.encode, room)
            if fitted.shown or any(document.text.strip() for document in result.documents):
                return fitted
        body = writer.dialect.failed if result.status in ("timeout", "error") else writer.dialect.empty
        token_ids = writer.encode(body)
        return (body, token_ids, 0) if len(token_ids) <= room else ("", [], 0)

    # Tokens

    def _insert(self, kind: SpanKind, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Append tokens of one origin; with log-probabilities they are sampled ones."""
        if not token_ids:
            return
        rollout = self.rollout
        start = len(rollout.token_ids)
        rollout.token_ids.extend(token_ids)
        rollout.loss_mask.extend([int(logprobs is not None)] * len(token_ids))
        rollout.logprobs.extend([0.0] * len(token_ids) if logprobs is None else logprobs)
        rollout.spans.append(Span(kind, start, len(rollout.token_ids)))

    def _inject(self, hit: Hit, token_ids: Sequence[int], turn: int) -> None:
        start = len(self.rollout.token_ids)
        self._insert("experience", token_ids)
        entry = hit.experience
        self.rollout.injections.append(
            Injection(entry.exp_id, entry.rev, entry.level, float(hit.score), turn, start, len(self.rollout.token_ids))
        )


def _normalised(query: str) -> str:
    """What two queries share that ask for the same: compatibility forms, case and spaces do not count."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())
