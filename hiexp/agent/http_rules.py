"""What the HTTP clients share: errors that never show a secret, and when and how long to wait before a retry."""

from __future__ import annotations

import os
import random
import re
import time
import urllib.parse
from collections.abc import Iterable
from email.utils import parsedate_to_datetime

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
REFUSALS = frozenset({400, 413, 422})
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 20.0
_SHOWN = 200  # characters of an answer in a message
_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # a shorter value of a variable is more often an ordinary word
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")
_PARAMETER = re.compile(r"([?&][\w-]*(?:key|token|secret|password)=)[^&#\s'\"]+", re.IGNORECASE)


class ServiceError(OSError):
    """A server cannot be reached, keeps failing, or answers something else than its schema; names the URL.

    The message is blotted: whoever raises it need not think of keys that a server repeats.
    """

    def __init__(self, message: str) -> None:
        super().__init__(blot(message))


class UnavailableError(ServiceError):
    """A server gave no answer in all attempts: it may come back."""


class RefusedError(ServiceError):
    """A server refuses what is in this very request (400, 413, 422): another one may pass."""


def blot(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with ``***`` for what nobody may read in a log.

    That is: ``secrets``, the values of environment variables named like a key, token, secret or password (from eight
    characters on), the user and password of a URL, and parameters of a URL named like a key.
    """
    known = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    words = {word for word in known if len(word) >= _SHORTEST_SECRET} | {word for word in secrets if word}
    for word in sorted(words, key=len, reverse=True):  # a key that starts with another one goes as a whole
        text = text.replace(word, "***")
    return _PARAMETER.sub(r"\1***", _CREDENTIALS.sub("***@", text))


def start_of(data: bytes, secrets: Iterable[str] = ()) -> str:
    """The beginning of an answer for a message, blotted before it is cut: half a key is a secret too."""
    return repr(blot(data[: 16 * _SHOWN].decode("utf-8", "replace"), secrets)[:_SHOWN])


def shown(value: object, secrets: Iterable[str] = ()) -> str:
    """The beginning of what a server sent, for a message; blotted before it is cut."""
    return blot(repr(value), secrets)[:_SHOWN]


def check_url(name: str, url: str) -> urllib.parse.SplitResult:
    """The parts of an http(s) URL, or ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{name}: expected http://HOST:PORT/…, got {blot(url)!r}")
    return parts


def wait(attempt: int, asked: float | None, jitter: bool) -> None:
    """Sleep before attempt ``attempt`` + 2: ``asked`` seconds, else 0.2 s, 0.4 s, …; at most 20 s.

    ``jitter``: between half and all of it, so that clients that failed together do not come back together.
    """
    pause = _FIRST_PAUSE_S * 2**attempt * (random.uniform(0.5, 1.0) if jitter else 1.0)
    time.sleep(min(_LONGEST_PAUSE_S, pause if asked is None else asked))


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, a number or a date; None where it says neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
