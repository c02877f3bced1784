"""Search tools as the agent sees them: queries in, documents out; every failure becomes a record, never an exception.

A tool is any object with a ``name`` and ``search(queries, top_k)``. :func:`call_tool` guards it: a time limit (a tool
that hangs keeps its own daemon thread and nothing else), exceptions, and results that are not what was promised.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hiexp.agent.record import ToolStatus

_ERROR_CHARACTERS = 300  # an error message is kept in the rollout; a stack of HTML is not


@dataclass(frozen=True, slots=True)
class Document:
    """One retrieved passage. ``id`` is unique within its corpus."""

    id: str
    title: str
    text: str


class Tool(Protocol):
    """A search tool: deterministic for the same corpus, query and ``top_k``.

    One that waits for another machine says so with an attribute ``remote = True``: it is asked in background threads,
    several at once, while other rollouts go on. Without the attribute a tool is asked in turn.
    """

    @property
    def name(self) -> str: ...

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """Best documents first, at most ``top_k``, one list per query."""
        ...


class ToolResult(NamedTuple):
    """Outcome of one query. ``seconds`` is the time of the whole batch it was part of."""

    documents: list[Document]
    status: ToolStatus
    seconds: float
    error: str | None


def call_tool(tool: Tool, queries: Sequence[str], top_k: int, timeout_s: float) -> list[ToolResult]:
    """Search all ``queries`` as one batch within ``timeout_s`` seconds of wall time.

    When the batch raises, its queries are tried one by one in the time that is left, so that one bad query does not
    spoil the others. Never raises for what the tool does.
    """
    if not queries:
        return []
    started = time.monotonic()
    outcome = _guarded(tool, queries, top_k, timeout_s)
    if isinstance(outcome, _Failure) and outcome.status == "error" and len(queries) > 1:
        return [_alone(tool, query, top_k, started, timeout_s) for query in queries]
    return _timed(outcome, len(queries), time.monotonic() - started)


class _Failure(NamedTuple):
    status: ToolStatus
    error: str


_Outcome = list[ToolResult] | _Failure


def _alone(tool: Tool, query: str, top_k: int, batch_started: float, timeout_s: float) -> ToolResult:
    started = time.monotonic()
    left = timeout_s - (started - batch_started)
    outcome = _guarded(tool, [query], top_k, left) if left > 0 else _timeout(timeout_s)
    return _timed(outcome, 1, time.monotonic() - started)[0]


def _guarded(tool: Tool, queries: Sequence[str], top_k: int, timeout_s: float) -> _Outcome:
    """The checked results of ``tool.search``, without their time, or a :class:`_Failure`."""
    inbox: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()

    def work() -> None:
        try:
            # Checked here: the documents are the tool's objects, and looking at one may raise or hang as well.
            inbox.put(_results(tool.search(list(queries), top_k), len(queries), top_k))
        except BaseException as error:  # SystemExit too: it would end this thread alone, and look like a hung tool
            inbox.put(_Failure("error", _valid_text(f"{type(error).__name__}: {error}")[:_ERROR_CHARACTERS]))

    # A pool would join its threads when the interpreter exits, and a hung tool would hang the exit: so a daemon thread.
    threading.Thread(target=work, name=f"hiexp-tool-{type(tool).__name__}", daemon=True).start()
    try:
        return inbox.get(timeout=timeout_s)
    except queue.Empty:
        return _timeout(timeout_s)


def _timeout(timeout_s: float) -> _Failure:
    return _Failure("timeout", f"no result within {timeout_s:g} s")


def _timed(outcome: _Outcome, count: int, seconds: float) -> list[ToolResult]:
    if isinstance(outcome, _Failure):
        return [ToolResult([], outcome.status, seconds, outcome.error)] * count
    return [result._replace(seconds=seconds) for result in outcome]


def _results(found: Any, count: int, top_k: int) -> list[ToolResult]:
    if not isinstance(found, (list, tuple)) or len(found) != count:
        size = f" of length {len(found)}" if isinstance(found, (list, tuple)) else ""
        problem = f"expected {count} lists of documents, got {type(found).__name__}{size}"
        return [ToolResult([], "error", 0.0, problem)] * count
    return [_checked(documents, top_k) for documents in found]


def _checked(documents: Any, top_k: int) -> ToolResult:
    """One query's result after validation; too many documents are cut, anything else unexpected is an error."""
    if not isinstance(documents, (list, tuple)):
        return ToolResult([], "error", 0.0, f"expected a list of documents, got {type(documents).__name__}")
    kept = []
    for document in documents:
        fields = [getattr(document, name, None) for name in ("id", "title", "text")]
        if not all(isinstance(value, str) for value in fields):
            kinds = ", ".join(type(value).__name__ for value in fields)
            problem = f"expected documents with str id, title and text, got {type(document).__name__} ({kinds})"
            return ToolResult([], "error", 0.0, problem)
        kept.append(Document(*(_valid_text(str(value)) for value in fields)))
    return ToolResult(kept[:top_k], "ok" if kept[:top_k] else "empty", 0.0, None)


def _valid_text(text: str) -> str:
    """``text`` with ``?`` for every lone surrogate: legal in JSON escapes, but no tokenizer and no file takes one."""
    return text.encode("utf-8", "replace").decode("utf-8")
