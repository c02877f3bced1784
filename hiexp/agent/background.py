"""Work that waits for someone else (a server, a slow tool) in threads, a bounded number at once.

Daemon threads that end when nothing is queued: none idles, and one that hangs cannot hold up the interpreter's exit.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")


class Outcome(NamedTuple, Generic[Result]):
    """What one piece of work came to: ``value``, or the ``error`` it raised."""

    key: int
    value: Result | None
    error: BaseException | None


class Background(Generic[Result]):
    """Runs work under integer keys, ``limit`` at once, in the order it was submitted. Used from one thread.

    A key may be submitted again once its outcome was collected or after :meth:`drop`.
    """

    def __init__(self, limit: int, name: str) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self._limit, self._name = limit, name
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, int, Callable[[], Result]]] = deque()
        self._threads = 0
        self._outcomes: queue.SimpleQueue[tuple[int, Outcome[Result]]] = queue.SimpleQueue()
        self._tickets: dict[int, int] = {}  # by key; an outcome with another ticket belongs to dropped work
        self._issued = 0

    def __len__(self) -> int:
        """Keys whose outcome was not collected yet."""
        return len(self._tickets)

    def submit(self, key: int, work: Callable[[], Result]) -> None:
        """Run ``work`` as soon as a thread is free."""
        self._issued += 1
        self._tickets[key] = self._issued
        with self._lock:
            self._queue.append((key, self._issued, work))
            if self._threads >= self._limit:
                return
            self._threads += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def collect(self, timeout_s: float | None) -> list[Outcome[Result]]:
        """All outcomes that are there; waits up to ``timeout_s`` (None: as long as it takes) for the first."""
        found: list[Outcome[Result]] = []
        try:
            while self._tickets and not found:
                self._keep(self._outcomes.get(timeout=timeout_s), found)
            while self._tickets:
                self._keep(self._outcomes.get_nowait(), found)
        except queue.Empty:
            pass
        return found

    def drop(self, key: int) -> None:
        """Forget the work of ``key``; what has not begun does not begin."""
        self._tickets.pop(key, None)
        with self._lock:
            self._queue = deque(item for item in self._queue if item[0] != key)

    def close(self) -> None:
        """Forget all work; running threads end with what they are doing."""
        with self._lock:
            self._queue.clear()
        self._tickets.clear()

    def _keep(self, item: tuple[int, Outcome[Result]], found: list[Outcome[Result]]) -> None:
        ticket, outcome = item
        if self._tickets.get(outcome.key) == ticket:
            del self._tickets[outcome.key]
            found.append(outcome)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                key, ticket, work = self._queue.popleft()
            try:
                self._outcomes.put((ticket, Outcome(key, work(), None)))
            except BaseException as error:  # SystemExit too: nobody would ever collect this key
                self._outcomes.put((ticket, Outcome(key, None, error)))
