"""Many conversations at once: each speaks, searches and goes on at its own pace, and is handed out when it ends.

At most ``batch_rows`` conversations are in flight; the next begins when one ends. A tool in this process is asked at
once, for all conversations whose turns ended together, so that the schedule, and with it every rounding, is a function
of the inputs. A tool that says ``remote = True`` is asked in background threads while other rows go on generating.
Where the engine dies, the conversations in flight go on from their tokens in a new session; where it ran out of memory,
half of them, and the others when those are over.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from hiexp.agent.background import Background
from hiexp.agent.conversation import Conversation
from hiexp.agent.engine import EngineError, EngineMemoryError, Generation, Session
from hiexp.agent.prompts import Writer
from hiexp.agent.record import Rollout
from hiexp.agent.tools import ToolResult, call_tool
from hiexp.experience.prompt import render_tool
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.rollout import SearchAgent
    from hiexp.experience.retrieve import Hit, Snapshot

Cancel = Callable[[], bool] | threading.Event
_LOOK_S = 0.05  # how often cancellation is looked at while only tools are at work


class Driver:
    """The conversations of one call of :meth:`hiexp.agent.rollout.SearchAgent.stream`."""

    def __init__(self, agent: SearchAgent, snapshot: Snapshot | None, cancel: Cancel | None) -> None:
        self.agent, self.snapshot = agent, snapshot
        self._cancelled = cancel.is_set if isinstance(cancel, threading.Event) else cancel
        self._writer = Writer(agent)
        self._calls: Background[list[ToolResult]] | None = (
            Background(agent.remote_calls, f"hiexp-{agent.tool.name}") if getattr(agent.tool, "remote", False) else None
        )
        self._conversations: list[Conversation] = []
        self._most = agent.batch_rows or 0  # in flight; all where the agent sets no limit
        self._waiting: deque[int] = deque()  # conversations that have not begun
        self._flying: dict[int, None] = {}  # those that have and are not over, in the order they began
        self._over: deque[int] = deque()  # those that ended and were not handed out
        self._searching: list[int] = []  # those whose search was not sent yet
        self._tries: Counter[int] = Counter()  # sessions that died under a conversation
        self._session: Session
        self._row: dict[int, int] = {}  # by conversation
        self._conversation: list[int] = []  # by row

    def write_prompts(self, questions: Sequence[Question], rollouts: Sequence[Rollout], shown: Sequence[bool]) -> None:
        """Begin the records. ValueError names a question whose prompt leaves no room."""
        self._conversations = [
            Conversation(self.agent, self._writer, question, rollout, bool(allowed) and self.snapshot is not None)
            for question, rollout, allowed in zip(questions, rollouts, shown, strict=True)
        ]
        entries = self._entries([one for one in self._conversations if one.shown])
        for conversation in self._conversations:
            conversation.write_prompt(next(entries) if conversation.shown else [])

    def _entries(self, conversations: Sequence[Conversation]) -> Iterator[list[Hit]]:
        """The E2 and E3 entries of each of these conversations."""
        if not conversations or self.agent.start_top_k < 1 or self.snapshot is None:
            return iter([[] for _ in conversations])
        asked = [one.question for one in conversations]
        return iter(
            self.snapshot.retrieve_many(
                [question.text for question in asked],
                level=tuple(self.agent.start_levels),
                top_k=self.agent.start_top_k,
                exclude_questions=asked,
            )
        )

    def stream(self) -> Iterator[tuple[int, Rollout]]:
        """``(place, rollout)`` of every conversation as it ends; cancelled ones last, in order.

        Raises:
            EngineError: the engine died more than ``engine_retries`` times on one conversation.
        """
        self._waiting.extend(range(len(self._conversations)))
        self._most = self._most or len(self._conversations)
        self._open()
        try:
            while self._waiting or self._flying:
                if self._cancelled is not None and self._cancelled():
                    self._cancel()
                else:
                    self._advance()
                yield from self._hand_out()
        except EngineError:
            yield from self._hand_out()
            raise
        finally:
            self._close()

    def _advance(self) -> None:
        """Let new conversations begin and the engine and the tools do some work; an engine that dies is replaced."""
        try:
            self._begin()
            self._ask()
            searching = 0 if self._calls is None else len(self._calls)
            if searching < len(self._flying):
                self._ended(self._session.finished(block=not searching and self._cancelled is None))
                self._ask()
            if self._calls is not None and searching:
                outcomes = self._calls.collect(_LOOK_S if searching >= len(self._flying) else 0.0)
                self._reply([(one.key, _value(one.value, one.error)) for one in outcomes])
        except EngineError as error:
            self._restart(error)

    def _begin(self) -> None:
        room = max(0, self._most - len(self._flying))
        places = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._flying.update(dict.fromkeys(places))
        self._speak(places)

    def _speak(self, places: Sequence[int]) -> None:
        if places:
            limits = [self._conversations[place].limit() for place in places]
            rows = [self._row[place] for place in places]
            self._session.start(rows, limits, self._writer.dialect.stop, self.agent.sampling)

    # What came back

    def _ended(self, said: Sequence[tuple[int, Generation]]) -> None:
        """Record turns."""
        places = [self._conversation[row] for row, _ in said]
        for place, (_, generation) in zip(places, said, strict=True):
            self._conversations[place].take(generation)
        # Noted before the session is touched: if it dies there the searches are still carried out.
        self._searching += [place for place in places if self._conversations[place].query is not None]
        self._land(places)

    def _ask(self) -> None:
        """Carry out the searches that turns asked for: at once in this process, else in the background."""
        agent, places = self.agent, self._searching
        known = [(place, self._conversations[place].repeated()) for place in places]
        results = [(place, result) for place, result in known if result is not None]
        places = [place for place, result in known if result is None]
        queries = [self._conversations[place].query or "" for place in places]
        if self._calls is None:
            results += zip(places, call_tool(agent.tool, queries, agent.top_k, agent.tool_timeout_s), strict=True)
        else:
            for place, query in zip(places, queries, strict=True):
                self._calls.submit(place, partial(call_tool, agent.tool, [query], agent.top_k, agent.tool_timeout_s))
        self._searching = []
        self._reply(sorted(results, key=lambda item: item[0]))

    def _reply(self, results: Sequence[tuple[int, ToolResult]]) -> None:
        """Insert tool responses and let the conversations speak that go on."""
        places = [place for place, _ in results]
        lengths = [len(self._conversations[place].rollout.token_ids) for place in places]
        lessons = self._lessons(places)
        for place, result in results:
            self._conversations[place].reply(result, lessons.get(place))
        self._land(places)
        going = [(place, start) for place, start in zip(places, lengths, strict=True) if place in self._flying]
        if going:
            self._session.extend(
                [self._row[place] for place, _ in going],
                [self._conversations[place].rollout.token_ids[start:] for place, start in going],
            )
            self._speak([place for place, _ in going])

    def _lessons(self, places: Sequence[int]) -> dict[int, Hit]:
        """The best E1 entry for the query of each conversation that is shown experience, where one is near enough."""
        asked = [place for place in places if self._conversations[place].shown]
        if not asked or self.snapshot is None:
            return {}
        found = self.snapshot.retrieve_many(
            [self._conversations[place].query or "" for place in asked],
            level="E1",
            top_k=1,
            threshold=self.agent.e1_threshold,
            exclude_questions=[self._conversations[place].question for place in asked],
        )
        return {place: hits[0] for place, hits in zip(asked, found, strict=True) if hits and render_tool(hits[0])}

    def _land(self, places: Sequence[int]) -> None:
        """Those of ``places`` that are over leave the session."""
        over = [place for place in places if self._conversations[place].over]
        for place in over:
            del self._flying[place]
            self._over.append(place)
        self._session.release([self._row[place] for place in over])

    def _hand_out(self) -> Iterator[tuple[int, Rollout]]:
        while self._over:
            place = self._over.popleft()
            yield place, self._conversations[place].rollout

    # Beginning and end

    def _open(self) -> None:
        """A session of all conversations that are not over."""
        self._conversation = [*self._flying, *self._waiting]
        self._row = {place: row for row, place in enumerate(self._conversation)}
        ones = [self._conversations[place] for place in self._conversation]
        self._session = self.agent.engine.open(
            [one.rollout.token_ids for one in ones], [one.rollout.seed for one in ones], [one.sampled for one in ones]
        )

    def _restart(self, error: EngineError) -> None:
        """Go on in a new session; conversations that wait for a tool go on waiting."""
        fewer = isinstance(error, EngineMemoryError) and self._halve(error)
        for place in self._flying:
            rollout = self._conversations[place].rollout
            rollout.engine_restarts += 1
            # Fewer rows are no second try of the same.
            self._tries[place] += not fewer
            if self._tries[place] > self.agent.engine_retries:
                raise EngineError(f"rollout {rollout.rollout_id}: {error} ({self._tries[place]} times)") from error
        try:
            self._open()
            self._speak([place for place in self._flying if self._conversations[place].query is None])
        except EngineError as again:
            if not self._flying:
                raise
            self._restart(again)

    def _halve(self, error: EngineError) -> bool:
        """Let half of the conversations in flight wait; False where there is but one."""
        speaking = [place for place in self._flying if self._conversations[place].query is None]
        if len(speaking) < 2:
            return False
        self._most = len(speaking) // 2
        for place in reversed(speaking[self._most :]):
            del self._flying[place]
            self._waiting.appendleft(place)
        warnings.warn(
            f"{error}; going on with {self._most} instead of {len(speaking)} conversations in flight: lower "
            "rollout.batch_rows to start with fewer",
            RuntimeWarning,
            stacklevel=2,
        )
        return True

    def _cancel(self) -> None:
        places = sorted([*self._flying, *self._waiting])
        self._waiting.clear()
        self._flying = dict.fromkeys(places)
        for place in places:
            self._conversations[place].end("cancelled")
        with suppress(EngineError):  # one that died holds nothing any more
            self._land(places)

    def _close(self) -> None:
        """Leave nothing at work: also after an error, an interrupt, or when nobody asks for the rest."""
        if self._calls is not None:
            self._calls.close()
        with suppress(EngineError):
            self._session.release([self._row[place] for place in [*self._flying, *self._waiting]])


def _value(results: list[ToolResult] | None, error: BaseException | None) -> ToolResult:
    """The result of one background search; :func:`call_tool` raises nothing, so an error is a bug of ours."""
    if results is None:
        raise RuntimeError(f"call_tool: {error}") from error
    return results[0]
