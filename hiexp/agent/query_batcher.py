"""Searches of many threads as few batches: while one search runs the next requests gather, then go together.

A dense index is read once for a whole batch, and an encoder is several times faster on one. One thread searches, since
encoders and indexes use all cores themselves.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

_MAX_BATCH = 256  # queries in one search; a single larger request goes alone


class BusyError(RuntimeError):
    """Too many queries wait already."""


class _Request:
    __slots__ = ("done", "error", "found", "queries", "top_k")

    def __init__(self, queries: list[str], top_k: int) -> None:
        self.queries, self.top_k = queries, top_k
        self.done = threading.Event()
        self.found: list[Any] = []
        self.error: BaseException | None = None


class QueryBatcher:
    """Calls ``tool.search_scored`` from one thread, with the queries of several callers at once.

    Args:
        max_waiting: most queries that may wait; a further request is refused with :class:`BusyError`, except where
            nothing waits.

    Attributes:
        searches: batches searched. queries: queries answered. refused: requests turned away.
    """

    def __init__(self, tool: Any, max_waiting: int) -> None:
        self._tool, self._max_waiting = tool, max_waiting
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = self.searches = self.queries = self.refused = 0
        self._thread = threading.Thread(target=self._work, name="hiexp-searches", daemon=True)
        self._thread.start()

    def search(self, queries: list[str], top_k: int) -> list[Any]:
        """The tool's scored documents of each query; blocks until its batch was searched.

        Raises:
            BusyError: the queue is full, or the batcher was closed. Whatever the tool raises for these very queries.
        """
        request = _Request(queries, top_k)
        with self._changed:
            if self._closed or (self.waiting and self.waiting + len(queries) > self._max_waiting):
                self.refused += 1
                raise BusyError(f"{self.waiting} queries wait already, the limit is {self._max_waiting}")
            self._queue.append(request)
            self.waiting += len(queries)
            self._changed.notify_all()
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.found

    def close(self) -> None:
        """Answer what waits, take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._search(batch)
            except Exception:  # one bad query must not spoil the others
                for request in batch:
                    try:
                        self._search([request])
                    except Exception as error:
                        request.error = error
            for request in batch:
                request.done.set()

    def _next(self) -> list[_Request]:
        """The oldest request and the others that fit into its batch; empty when closed and all is answered."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[_Request] = []
            size, others = 0, deque[_Request]()
            for request in self._queue:
                # Not searched for more documents and cut: approximate indexes would then answer by their load.
                fits = not batch or (request.top_k == batch[0].top_k and size + len(request.queries) <= _MAX_BATCH)
                (batch if fits else others).append(request)
                size += len(request.queries) if fits else 0
            self._queue = others
            self.waiting -= size
            return batch

    def _search(self, batch: list[_Request]) -> None:
        queries = [query for request in batch for query in request.queries]
        found = self._tool.search_scored(queries, batch[0].top_k)
        if len(found) != len(queries):
            raise ValueError(f"{self._tool.name}: expected {len(queries)} lists of documents, got {len(found)}")
        self.searches += 1
        self.queries += len(queries)
        start = 0
        for request in batch:
            request.found = found[start : start + len(request.queries)]
            start += len(request.queries)
