"""Kept-open HTTP connections to one URL, a bounded number at once, and a time limit that no slow answer outlasts."""

from __future__ import annotations

import base64
import http.client
import io
import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_MAX_REPLY_BYTES = 64 << 20
_READ_BYTES = 1 << 16
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class Reply(NamedTuple):
    """What came over the wire, whole; ``headers`` by their names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Request(NamedTuple):
    """What is sent; ``query`` is added to that of the URL."""

    method: str
    query: str
    data: bytes | None
    headers: Mapping[str, str]


class Connections:
    """Connections to the server of one URL, used again and again; proxies of the environment are used.

    Args:
        parts: an http(s) URL, see :func:`hiexp.agent.http_rules.check_url`.
        limit: most requests under way at once; further callers wait.
    """

    def __init__(self, parts: urllib.parse.SplitResult, limit: int) -> None:
        self._parts, host = parts, parts.hostname or ""
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
        self._proxy = None if proxy is None else urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        self._free: list[http.client.HTTPConnection] = []
        self._slots = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()

    def send(self, request: Request, timeout_s: float) -> Reply:
        """The reply to ``request``, at most ``timeout_s`` after a place among the connections was free.

        A kept connection that the server has closed meanwhile is replaced at once. The limit covers connecting, headers
        and body; what it does not bound is the look-up of the host's name, and each address of a name gets it anew.

        Raises:
            OSError, http.client.HTTPException: the connection or the answer broke; TimeoutError after ``timeout_s``.
        """
        with self._slots:
            with self._lock:
                kept = self._free.pop() if self._free else None
            deadline = time.monotonic() + timeout_s
            try:
                if kept is not None:
                    try:
                        return self._exchange(kept, request, deadline)
                    except _STALE:
                        pass
                return self._exchange(self._connection(), request, deadline)
            except TimeoutError as error:
                raise TimeoutError(f"no complete answer in {timeout_s:g} s") from error

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._free = self._free, []
        for connection in idle:
            connection.close()

    def _exchange(self, connection: http.client.HTTPConnection, request: Request, deadline: float) -> Reply:
        try:
            connection.response_class = _answers_until(deadline)
            connection.timeout = _left(deadline)
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(_left(deadline))
            target, headers = self._target(request.query), {**self._forwarded(), **request.headers}
            connection.request(request.method, target, request.data, headers)
            with connection.getresponse() as response:
                known = {name.lower(): value for name, value in response.headers.items()}
                reply, keep = Reply(response.status, known, _read(response)), not response.will_close
        except BaseException:
            connection.close()
            raise
        if keep:
            with self._lock:
                self._free.append(connection)
        else:
            connection.close()
        return reply

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        host = self._parts.hostname or ""
        if self._proxy is None:
            return kind(host, self._parts.port)
        connection = kind(self._proxy.hostname or "", self._proxy.port)
        if kind is http.client.HTTPSConnection:
            connection.set_tunnel(host, self._parts.port, _credentials(self._proxy))
        return connection

    @property
    def _plain_proxy(self) -> urllib.parse.SplitResult | None:
        """The proxy that reads the requests themselves; through others they go as through a tunnel."""
        return self._proxy if self._parts.scheme == "http" else None

    def _forwarded(self) -> dict[str, str]:
        return _credentials(self._plain_proxy) if self._plain_proxy is not None else {}

    def _target(self, query: str) -> str:
        whole = "&".join(filter(None, (self._parts.query, query)))
        target = (self._parts.path or "/") + (f"?{whole}" if whole else "")
        return target if self._plain_proxy is None else f"http://{self._parts.netloc.rpartition('@')[2]}{target}"


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


class _Timed(io.RawIOBase):
    """What a socket receives until a deadline; its own time-out would begin anew at every byte."""

    def __init__(self, connected: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self._socket, self._raw, self._deadline = connected, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _answers_until(deadline: float) -> type[http.client.HTTPResponse]:
    class Answer(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
            super().__init__(sock, *args, **options)
            self.fp = io.BufferedReader(_Timed(sock, self.fp.detach(), deadline))

    return Answer


def _left(deadline: float) -> float:
    """Seconds until ``deadline``, above 0: a socket takes 0 for "never wait"."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _credentials(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body, or an error when it breaks off or is too long."""
    blocks, size = [], 0
    while block := response.read1(_READ_BYTES):
        blocks.append(block)
        size += len(block)
        if size > _MAX_REPLY_BYTES:
            raise http.client.HTTPException(f"an answer of more than {_MAX_REPLY_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"".join(blocks), response.length)
    return b"".join(blocks)
