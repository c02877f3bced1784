"""One batch of conversations between policy and tool: prompts, turns, replies, and the record of every token.

What was sampled is kept as it was sampled, what is inserted is tokenised alone, and mask and spans are written while
that happens; nothing is decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hiexp.agent.engine import Generation, Session, generate
from hiexp.agent.protocol import Action, get_dialect
from hiexp.agent.record import FinishReason, Injection, Rollout, Span, SpanKind, ToolCall
from hiexp.agent.tools import ToolResult, call_tool
from hiexp.experience.prompt import render_start, render_tool
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.rollout import SearchAgent
    from hiexp.experience.retrieve import Hit, Snapshot

_SLOT = "\x00"  # marks where experience goes in a prompt; cleaned text cannot contain it
_FINISH: dict[str, FinishReason] = {"stop": "malformed", "eos": "eos", "length": "max_tokens", "context": "context"}


class Conversations:
    """The conversations of one call of :meth:`hiexp.agent.rollout.SearchAgent.run`."""

    def __init__(self, agent: SearchAgent, snapshot: Snapshot | None) -> None:
        self.agent, self.snapshot = agent, snapshot
        self.tokenizer = agent.engine.tokenizer
        self.dialect = get_dialect(agent.dialect)
        context = agent.engine.context_length
        self.limit = min(agent.max_total_tokens or context, context)
        self.banned = tuple(self.tokenizer.all_special_tokens)
        self.chat = self.dialect.chat if agent.chat_template is None else agent.chat_template
        self.chat = self.chat and getattr(self.tokenizer, "chat_template", None) is not None
        self.questions: Sequence[Question] = ()
        self.shown: list[bool] = []
        self.rows: list[Rollout] = []
        self._prompts: dict[tuple[str, bool], list[list[int]]] = {}  # rows of a group share theirs

    def rollouts(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        with_experience: Sequence[bool],
        policy_step: int,
        indices: Sequence[int],
    ) -> list[Rollout]:
        """Hold the conversations; arguments as in ``SearchAgent.run``, all per row."""
        snapshot_id = None if self.snapshot is None else self.snapshot.id
        self.questions = questions
        self.shown = [bool(shown) and self.snapshot is not None for shown in with_experience]
        self.rows = [
            Rollout(
                rollout_id=f"{question.id}/{policy_step}/{index}", question_id=question.id, question=question.text,
                token_ids=[], loss_mask=[], logprobs=[], spans=[], injections=[], tool_calls=[],
                snapshot_id=snapshot_id, seed=int(seed), policy_step=policy_step, dialect=self.dialect.name,
                finish_reason="max_turns", answer=None,
            )
            for question, seed, index in zip(questions, seeds, indices, strict=True)
        ]  # fmt: skip
        self._write_prompts()
        session = self.agent.engine.open([row.token_ids for row in self.rows], list(seeds))
        active = list(range(len(self.rows)))
        for turn in range(1, self.agent.max_turns + 1):
            active = self._turn(session, active, turn)
            if not active:
                break
        return self.rows

    # Prompts

    def _write_prompts(self) -> None:
        places = [place for place, shown in enumerate(self.shown) if shown]
        hits: list[list[Hit]] = [[] for _ in self.rows]
        if places and self.agent.start_top_k > 0 and self.snapshot is not None:
            asked = [self.questions[place] for place in places]
            found = self.snapshot.retrieve_many(
                [question.text for question in asked],
                level=tuple(self.agent.start_levels),
                top_k=self.agent.start_top_k,
                exclude_questions=asked,
            )
            for place, entries in zip(places, found, strict=True):
                hits[place] = entries
        for row, entries in zip(self.rows, hits, strict=True):
            self._write_prompt(row, *self._fitting_prompt(row.question_id, row.question, entries))

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raise ValueError for the first question whose prompt, without experience, leaves no room in the limit."""
        for question in questions:
            text = "".join(self._prompt_parts(question.text, False))
            # A token is at least a byte: nearly all prompts are short enough not to be tokenised.
            if len(text.encode()) + len(self._beginning) >= self.limit:
                self._fitting_prompt(question.id, question.text, [])

    def _fitting_prompt(
        self, question_id: str, question: str, entries: Sequence[Hit]
    ) -> tuple[list[list[int]], list[tuple[Hit, list[int]]]]:
        """Tokens of the prompt's parts, and of the best entries that leave room in the limit for a token to sample.

        Raises:
            ValueError: the prompt does not fit even without experience.
        """
        for count in range(len(entries), -1, -1):
            parts = self._prompt_tokens(question, count > 0)
            lines = [(hit, self._encode(line)) for hit, line in self._start_lines(entries[:count])]
            length = sum(map(len, parts)) + sum(len(token_ids) for _, token_ids in lines)
            if length < self.limit:
                return parts, lines
        raise ValueError(
            f"question {question_id!r}: its prompt has {length} tokens and leaves no room in the limit of "
            f"{self.limit} tokens (context {self.agent.engine.context_length})"
        )

    def _prompt_tokens(self, question: str, with_slot: bool) -> list[list[int]]:
        key = (question, with_slot)
        if key not in self._prompts:
            first, *rest = map(self._encode, self._prompt_parts(question, with_slot))
            # A chat template writes its own beginning-of-sequence token.
            self._prompts[key] = [first if self.chat else self._beginning + first, *rest]
        return self._prompts[key]

    def _prompt_parts(self, question: str, with_slot: bool) -> list[str]:
        """Prompt text, cut where the experience goes."""
        text = self.dialect.build_prompt(
            self.dialect.sanitize(question, self.banned).strip(),
            _SLOT if with_slot else None,
            instructions=self.agent.instructions,
        )
        if self.chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text.split(_SLOT)

    def _write_prompt(self, row: Rollout, parts: Sequence[list[int]], lines: Sequence[tuple[Hit, list[int]]]) -> None:
        self._insert(row, "prompt", parts[0])
        for hit, token_ids in lines:
            self._inject(row, hit, token_ids, turn=0)
        for part in parts[1:]:
            self._insert(row, "prompt", part)

    def _start_lines(self, entries: Sequence[Hit]) -> list[tuple[Hit, str]]:
        """Each entry with its text in the prompt, what separates it from the next included."""
        kept = [hit for hit in entries if render_tool(hit)]
        if not kept:
            return []
        if self.dialect.compact:
            lines, between = [self._lesson(hit) for hit in kept], " ; "
        else:
            lines, between = render_start(kept).split("\n"), "\n"
        lines = [self.dialect.sanitize(line, self.banned) for line in lines]
        return [
            (hit, line + (between if place < len(kept) - 1 else ""))
            for place, (hit, line) in enumerate(zip(kept, lines, strict=True))
        ]

    def _lesson(self, hit: Hit) -> str:
        line = render_tool(hit)
        # The first clause is the lesson in plain words; quotations after it are outside a closed vocabulary.
        return self.dialect.sanitize(line.split(" ; ")[0] if self.dialect.compact else line, self.banned)

    # Turns

    def _turn(self, session: Session, active: list[int], turn: int) -> list[int]:
        """Sample a turn of the rows ``active``, carry out their searches; return the rows that go on."""
        limits = [min(self.agent.max_new_tokens, self.limit - len(self.rows[place].token_ids)) for place in active]
        generations = generate(session, active, limits, self.dialect.stop, self.agent.sampling)
        searches: list[tuple[int, str]] = []
        for place, generation in zip(active, generations, strict=True):
            action = self._take(self.rows[place], generation)
            if action.kind == "search" and turn < self.agent.max_turns:
                searches.append((place, action.text))
        queries = [query for _, query in searches]
        results = call_tool(self.agent.tool, queries, self.agent.top_k, self.agent.tool_timeout_s)
        lessons = self._lessons(searches)
        going_on: list[int] = []
        inserted: list[list[int]] = []
        for (place, query), result in zip(searches, results, strict=True):
            before = len(self.rows[place].token_ids)
            if self._write_reply(self.rows[place], query, result, lessons.get(place), turn):
                going_on.append(place)
                inserted.append(self.rows[place].token_ids[before:])
        session.extend(going_on, inserted)
        return going_on

    def _take(self, row: Rollout, generation: Generation) -> Action:
        """Record what was sampled; finish the row unless it searches."""
        start = len(row.token_ids)
        self._insert(row, "sampled", generation.token_ids, generation.logprobs)
        text = self.tokenizer.decode(
            row.token_ids[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        action = self.dialect.parse(text)
        if action.thought:
            row.steps.append(("think", action.thought))
        if action.kind == "search":
            row.steps.append(("query", action.text))
        elif action.kind == "answer":
            row.steps.append(("answer", action.text))
            row.finish_reason, row.answer = "answer", action.text
        else:
            full = generation.finish_reason == "length" and len(row.token_ids) >= self.agent.engine.context_length
            row.finish_reason = "context" if full else _FINISH[generation.finish_reason]
        return action

    def _lessons(self, searches: Sequence[tuple[int, str]]) -> dict[int, Hit]:
        """The best E1 entry for each query of a row that is shown experience, where one is near enough."""
        asked = [(place, query) for place, query in searches if self.shown[place]]
        if not asked or self.snapshot is None:
            return {}
        found = self.snapshot.retrieve_many(
            [query for _, query in asked],
            level="E1",
            top_k=1,
            threshold=self.agent.e1_threshold,
            exclude_questions=[self.questions[place] for place, _ in asked],
        )
        return {place: hits[0] for (place, _), hits in zip(asked, found, strict=True) if hits and render_tool(hits[0])}

    def _write_reply(self, row: Rollout, query: str, result: ToolResult, lesson: Hit | None, turn: int) -> bool:
        """Record the tool call and insert its response; False, and the row finished, where it does not fit."""
        names = [document.id for document in result.documents]
        row.tool_calls.append(ToolCall(turn, query, result.status, result.seconds, names, result.error))
        body = self.dialect.format_body(result.documents, self.banned)
        if not body:
            body = self.dialect.failed if result.status in ("timeout", "error") else self.dialect.empty
        row.steps.append(("documents", body))
        reply = self.dialect.enclose(body)
        opening, documents, closing = (self._encode(part) for part in reply)
        line = [] if lesson is None else self._encode(self.dialect.format_tool_experience(self._lesson(lesson)))
        # One token must be left to sample, one for documents; the tags and the lesson are never cut.
        room = self.limit - len(row.token_ids) - len(opening) - len(line) - len(closing) - 1
        if room < 1:
            row.finish_reason = "context" if self.limit == self.agent.engine.context_length else "max_tokens"
            return False
        self._insert(row, "template", opening)
        self._insert(row, "tool", documents[: min(room, self.agent.max_document_tokens)])
        if lesson is not None:
            self._inject(row, lesson, line, turn)
        self._insert(row, "template", closing)
        return True

    # Tokens

    def _insert(
        self, row: Rollout, kind: SpanKind, token_ids: Sequence[int], logprobs: Sequence[float] | None = None
    ) -> None:
        """Append tokens of one origin; with log-probabilities they are sampled ones."""
        if not token_ids:
            return
        start = len(row.token_ids)
        row.token_ids.extend(token_ids)
        row.loss_mask.extend([int(logprobs is not None)] * len(token_ids))
        row.logprobs.extend([0.0] * len(token_ids) if logprobs is None else logprobs)
        row.spans.append(Span(kind, start, len(row.token_ids)))

    def _inject(self, row: Rollout, hit: Hit, token_ids: Sequence[int], turn: int) -> None:
        start = len(row.token_ids)
        self._insert(row, "experience", token_ids)
        entry = hit.experience
        row.injections.append(
            Injection(entry.exp_id, entry.rev, entry.level, float(hit.score), turn, start, len(row.token_ids))
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @cached_property
    def _beginning(self) -> list[int]:
        """What the tokenizer puts before every text, e.g. a beginning-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        alone: list[Any] = list(self.tokenizer("")["input_ids"])
        return [bos] if bos is not None and alone[:1] == [bos] else []
