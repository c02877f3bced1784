"""Rows whose turns are requests to a server: what the engines over HTTP share. A turn is one request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from hiexp.agent.background import Background
from hiexp.agent.engine import EngineError, Generation, Sampling, check_turn, extend_rows
from hiexp.agent.http_rules import UnavailableError

_MOMENT_S = 0.02  # a round of work of an engine that works elsewhere


class RemoteSession(ABC):
    """Rows of one batch, see :class:`hiexp.agent.engine.Session`. ``tokens[i]``: row ``i`` so far, prompt included.

    Every turn is a request of its own, ``concurrency`` at once, and is handed out as soon as it is answered.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], context_length: int, concurrency: int) -> None:
        self.tokens = [list(prompt) for prompt in prompts]
        self._context_length = context_length
        self._busy: set[int] = set()  # rows that generate or are released
        self._requests: Background[Generation] = Background(concurrency, "hiexp-openai")
        self._failed: BaseException | None = None

    @abstractmethod
    def speaker(self, stop: Sequence[str], sampling: Sampling) -> Callable[[int, int], Generation]:
        """What turns a row and its limit of new tokens into the next turn; called in threads."""

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        """Send one turn of each of ``rows``; limits are per row."""
        check_turn(rows, max_new_tokens, self._busy, len(self.tokens))
        speak = self.speaker(stop, sampling)
        for row, wanted in zip(rows, max_new_tokens, strict=True):
            self._busy.add(row)
            self._requests.submit(row, partial(speak, row, wanted))

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        """Turns that were answered; with ``block=False`` it waits for an answer for a moment only.

        Raises:
            EngineError: the server did not answer in all attempts. ServiceError: it refuses the request for good, or
                answers something else than its schema. Turns that were answered before come first.
        """
        if self._failed is not None:
            raise self._failed
        done: list[tuple[int, Generation]] = []
        for row, generation, error in self._requests.collect(None if block else _MOMENT_S):
            if generation is None:
                self._failed = EngineError(str(error)) if isinstance(error, UnavailableError) else error
                continue
            self._busy.discard(row)
            self.tokens[row].extend(generation.token_ids)
            done.append((row, generation))
        if self._failed is not None:
            self._requests.close()
            if not done:
                raise self._failed
        return done

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens to the idle ``rows``."""
        extend_rows(self.tokens, rows, token_ids, self._context_length)

    def release(self, rows: Sequence[int]) -> None:
        """Forget the turns of ``rows``; requests that wait are not sent, answers on their way are dropped."""
        for row in rows:
            self._busy.add(row)
            self._requests.drop(row)
