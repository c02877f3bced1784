"""JSON over HTTP for clients of other people's servers: time-outs, retries with growing pauses, one clear error."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 20.0


class ServiceError(OSError):
    """A server cannot be reached, keeps failing, or answers something else than its schema; names the URL."""


class UnavailableError(ServiceError):
    """A server gave no answer in all attempts: it may come back."""


def check_url(name: str, url: str) -> urllib.parse.SplitResult:
    """The parts of an http(s) URL, or ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{name}: expected http://HOST:PORT/…, got {url!r}")
    return parts


def _body(error: urllib.error.HTTPError) -> bytes:
    """The body of an error answer; empty where it breaks off."""
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def post_json(
    url: str, body: Mapping[str, Any], *, timeout_s: float, retries: int, headers: Mapping[str, str] | None = None
) -> Any:
    """The JSON answer to a POST of ``body``.

    Status 408, 429 and 5xx, time-outs and broken connections, an answer that breaks off among them, are tried again up
    to ``retries`` times. The pauses are random between half and all of 0.2 s, 0.4 s, …, so that clients that failed
    together do not come back together, or what ``Retry-After`` (seconds or a date) says; at most 20 s each.

    Raises:
        UnavailableError: no answer in all attempts.
        ServiceError: any other status, or an answer that is no JSON from its start. Headers, which may hold a key, are
            never part of the message.
    """
    data = json.dumps(body).encode("utf-8")
    known = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, known), timeout=timeout_s) as response:
                reply = response.read()
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {start_of(_body(error))}"
            wait = _retry_after(error.headers.get("Retry-After"))
            if error.code not in _TRANSIENT:
                raise ServiceError(f"{url}: {problem}") from error
        except (OSError, http.client.HTTPException) as error:
            problem, wait = f"{type(error).__name__}: {error}", None
        else:
            try:
                return json.loads(reply)
            except (ValueError, RecursionError) as error:
                # A body without length that breaks off looks complete to the client; a page of HTML never was JSON.
                if not reply.lstrip().startswith((b"{", b"[")):
                    raise ServiceError(f"{url}: expected JSON, got {start_of(reply)}") from error
                problem, wait = f"an answer that is not valid JSON: {start_of(reply)}", None
        if attempt < retries:
            pause = wait if wait is not None else _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)
            time.sleep(min(_LONGEST_PAUSE_S, pause))
    raise UnavailableError(f"{url}: no answer in {retries + 1} attempts, last {problem}")


def start_of(data: bytes) -> str:
    """The beginning of an answer, for a message."""
    return repr(data[:200].decode("utf-8", "replace"))


def _retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, which may be a number or a date; None where it says neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
