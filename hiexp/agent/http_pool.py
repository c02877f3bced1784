"""JSON over kept-open HTTP connections, a bounded number at once: the client behind search tools on other machines.

Differs from http_json.py (one connection a call, for language-model servers) in that connections are used again, GET is
possible, secrets are blotted out of messages, and a server that drips its answer is cut off at the time limit.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from hiexp.agent.http_json import ServiceError, check_url, start_of

T = TypeVar("T")
R = TypeVar("R")
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 20.0
_MAX_REPLY_BYTES = 64 << 20
_READ_BYTES = 1 << 16
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class Reply(NamedTuple):
    """What came over the wire, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class JsonClient:
    """Requests to one URL.

    Args:
        url: http(s); proxies of the environment are used.
        timeout_s: seconds for one attempt, from connecting to the last byte.
        retries: further attempts after 408, 429, 5xx, a time-out or a broken connection, after 0.2 s, 0.4 s, … or what
            ``Retry-After`` (seconds or a date) says, at most 20 s each.
        connections: most requests under way at once; further callers wait.
        headers: sent with every request, never part of a message.
        secrets: words that are blotted out wherever a server repeats them.
        before: called before every attempt, for rate limits; what it raises ends the request.

    Attributes:
        requests: attempts made so far. retried: how many of them repeated a failed one.

    Raises:
        ValueError: ``url`` is no http(s) URL.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        connections: int,
        headers: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        self.url = url
        self._parts = check_url("url", url)
        self.timeout_s, self.retries, self.connections = timeout_s, retries, connections
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self._secrets, self._before = [word for word in secrets if word], before
        self._free: list[http.client.HTTPConnection] = []
        self._slots = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self.requests = self.retried = 0

    def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST of ``body``.

        Raises:
            ServiceError: another status than 200, no answer in all attempts, or one that is no JSON from its start.
        """
        return self._ask("POST", "", json.dumps(body).encode("utf-8"))

    def get(self, parameters: Mapping[str, str]) -> Any:
        """The JSON answer to a GET with a query string; errors as :meth:`post`."""
        encoded = urllib.parse.urlencode(parameters, errors="replace")  # a lone surrogate has no UTF-8 form
        return self._ask("GET", "?" + encoded, None)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._free = self._free, []
        for connection in idle:
            connection.close()

    def _ask(self, method: str, query: str, data: bytes | None) -> Any:
        problem = ""
        for attempt in range(self.retries + 1):
            if self._before is not None:
                self._before()
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            wait = None
            try:
                reply = self._send(method, query, data)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.status == 200:
                    try:
                        return json.loads(reply.body)
                    except (ValueError, RecursionError) as error:
                        # A body that breaks off may come whole next time; a page of HTML never was JSON.
                        if not reply.body.lstrip().startswith((b"{", b"[")):
                            raise ServiceError(
                                self._clean(f"{self.url}: expected JSON, got {start_of(reply.body)}")
                            ) from error
                        problem = f"an answer that is not valid JSON: {start_of(reply.body)}"
                else:
                    problem = f"status {reply.status}: {start_of(reply.body)}"
                wait = _retry_after(_header(reply.headers, "retry-after"))
                if reply.status != 200 and reply.status not in _TRANSIENT:
                    raise ServiceError(self._clean(f"{self.url}: {problem}"))
            if attempt < self.retries:
                time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt if wait is None else wait))
        raise ServiceError(self._clean(f"{self.url}: no answer in {self.retries + 1} attempts, last {problem}"))

    def _clean(self, text: str) -> str:
        for word in self._secrets:
            text = text.replace(word, "***")
        return text

    def _send(self, method: str, query: str, data: bytes | None) -> Reply:
        """One attempt; a kept connection that the server has closed meanwhile is replaced at once."""
        with self._slots:
            with self._lock:
                connection = self._free.pop() if self._free else None
            if connection is not None:
                try:
                    return self._exchange(connection, method, query, data)
                except _STALE:
                    pass
            return self._exchange(_connect(self._parts, self.timeout_s), method, query, data)

    def _exchange(self, connection: http.client.HTTPConnection, method: str, query: str, data: bytes | None) -> Reply:
        deadline = time.monotonic() + self.timeout_s
        try:
            connection.request(method, _target(self._parts, connection) + query, data, self._headers)
            with connection.getresponse() as response:
                reply = Reply(response.status, dict(response.headers.items()), _read(response, deadline))
                keep = not response.will_close
        except BaseException:
            connection.close()
            raise
        if keep:
            with self._lock:
                self._free.append(connection)
        else:
            connection.close()
        return reply


def parallel_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """``[function(item) for item in items]`` in up to ``workers`` threads; the first item's error is raised.

    Daemon threads, not a pool: one that hangs must not hold up the interpreter's exit.
    """
    todo = list(items)
    if len(todo) <= 1 or workers == 1:
        return [function(item) for item in todo]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(todo)):
        waiting.put(place)
    results: list[Any] = [None] * len(todo)
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while not errors:
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results[place] = function(todo[place])
            except BaseException as error:  # raised again below, in the caller's thread
                errors[place] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(todo)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return results


def _connect(parts: urllib.parse.SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host = parts.hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        return kind(host, parts.port, timeout=timeout_s)
    through = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connection = kind(through.hostname or "", through.port, timeout=timeout_s)
    if parts.scheme == "https":
        connection.set_tunnel(host, parts.port)
    return connection


def _target(parts: urllib.parse.SplitResult, connection: http.client.HTTPConnection) -> str:
    direct = parts.scheme == "https" or connection.host == parts.hostname
    return (parts.path or "/") if direct else f"{parts.scheme}://{parts.netloc}{parts.path}"


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, or an error when it is late or too long; a socket's own time-out begins anew at every byte."""
    blocks, size = [], 0
    while block := response.read1(_READ_BYTES):
        blocks.append(block)
        size += len(block)
        if size > _MAX_REPLY_BYTES:
            raise http.client.HTTPException(f"an answer of more than {_MAX_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer was not complete in time, {size} bytes had come")
    if response.length:
        raise http.client.IncompleteRead(b"".join(blocks), response.length)
    return b"".join(blocks)


def _header(headers: Mapping[str, str], name: str) -> str | None:
    return next((value for key, value in headers.items() if key.lower() == name), None)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, a number or a date; None where it says neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
