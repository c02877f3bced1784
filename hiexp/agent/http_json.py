"""JSON over HTTP for clients of other people's servers: time limits, retries with growing pauses, one clear error."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from hiexp.agent.http_pool import Connections, Reply, Request
from hiexp.agent.http_rules import (
    TRANSIENT,
    ServiceError,
    UnavailableError,
    blot,
    check_url,
    retry_after,
    start_of,
    wait,
)

_STANDARD = {"Content-Type": "application/json", "Accept": "application/json"}


class JsonClient:
    """Requests to one URL.

    Args:
        url: http(s); proxies of the environment are used.
        timeout_s: seconds for one attempt, from connecting to the last byte.
        retries: further attempts after 408, 429, 5xx, a time-out, a broken connection or an answer that breaks off,
            after 0.2 s, 0.4 s, … or what ``Retry-After`` (seconds or a date) says, at most 20 s each.
        connections: most requests under way at once; further callers wait.
        headers: sent with every request; their values, a key as a rule, are blotted out wherever a server repeats them.
        jitter: the pauses are random between half and all of the above, for clients that many processes run at once.
        before: called before every attempt, for rate limits; what it raises ends the request.

    Attributes:
        requests: attempts made so far. retried: how many of them repeated a failed one.

    Raises:
        ValueError: ``url`` is no http(s) URL, or a header holds something else than printable ASCII.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        connections: int,
        headers: Mapping[str, str] | None = None,
        jitter: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._pool = Connections(check_url("url", url), connections)
        self.url, self.timeout_s, self.retries, self.connections = url, timeout_s, retries, connections
        for name, value in (headers or {}).items():
            if not (value.isascii() and value.isprintable()):
                raise ValueError(f"headers: expected printable ASCII as {name}, got other characters")
        self._headers = {**_STANDARD, **(headers or {})}
        self._secrets = [value.removeprefix("Bearer ") for value in (headers or {}).values()]
        self._jitter, self._before = jitter, before
        self._lock = threading.Lock()
        self.requests = self.retried = 0

    def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST of ``body``.

        Raises:
            UnavailableError: no answer in all attempts.
            ServiceError: a status that will not pass (a redirect too), or an answer that is no JSON from its start.
        """
        return self._ask(Request("POST", "", json.dumps(body).encode("utf-8"), self._headers))

    def get(self, parameters: Mapping[str, str]) -> Any:
        """The JSON answer to a GET with a query string; errors as :meth:`post`."""
        encoded = urllib.parse.urlencode(parameters, errors="replace")  # a lone surrogate has no UTF-8 form
        return self._ask(Request("GET", encoded, None, self._headers))

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    def _ask(self, request: Request) -> Any:
        problem = ""
        for attempt in range(self.retries + 1):
            if self._before is not None:
                self._before()
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            asked = None
            try:
                reply = self._pool.send(request, self.timeout_s)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if 200 <= reply.status < 300:
                    try:
                        return json.loads(reply.body)
                    except (ValueError, RecursionError) as error:
                        problem = self._no_json(reply, error)
                else:
                    problem = f"status {reply.status}: {self._start_of(reply)}"
                    if reply.status not in TRANSIENT:
                        raise self._error(ServiceError, problem)
                asked = retry_after(reply.headers.get("retry-after"))
            if attempt < self.retries:
                wait(attempt, asked, self._jitter)
        raise self._error(UnavailableError, f"no answer in {self.retries + 1} attempts, last {problem}")

    def _no_json(self, reply: Reply, error: Exception) -> str:
        # A body without length that breaks off looks complete to the client; a page of HTML never was JSON.
        if not reply.body.lstrip().startswith((b"{", b"[")):
            raise self._error(ServiceError, f"expected JSON, got {self._start_of(reply)}") from error
        return f"an answer that is not valid JSON: {self._start_of(reply)}"

    def _start_of(self, reply: Reply) -> str:
        return start_of(reply.body, self._secrets)

    def _error(self, kind: type[ServiceError], problem: str) -> ServiceError:
        return kind(blot(f"{self.url}: {problem}", self._secrets))


def post_json(
    url: str, body: Mapping[str, Any], *, timeout_s: float, retries: int, headers: Mapping[str, str] | None = None
) -> Any:
    """The JSON answer to one POST of ``body`` over a connection of its own; see :class:`JsonClient`, with jitter."""
    client = JsonClient(url, timeout_s=timeout_s, retries=retries, connections=1, headers=headers, jitter=True)
    try:
        return client.post(body)
    finally:
        client.close()
