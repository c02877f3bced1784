"""An engine behind a hosted chat API: text in, text out; for evaluation only.

Such an API gives neither token ids nor log-probabilities. A stand-in tokenizer carries the text through the token
protocol, and each id says where its bytes came from, so that the messages follow from the ids alone: what the agent
inserted (prompt, documents) goes to the server as user messages, what the model said as assistant messages, in turn.

Most APIs cut the stop string off and do not say which one it was. It is put back where the grammar needs it: behind the
tag that was opened last and is still open (``<search>`` asks for ``</search>``). vLLM says it (``stop_reason``).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from hiexp.agent.engine import Generation, Sampling, check_prompts
from hiexp.agent.http_rules import RefusedError
from hiexp.agent.openai_server import OpenAIServer
from hiexp.agent.protocol import closing_brace, opening_tag
from hiexp.agent.remote_session import RemoteSession

_WIDTH = 4  # bytes of a stand-in token: about as many as an English token of a usual vocabulary has
_INSERTED, _SAID = b"\x01", b"\x02"
_NO_ROOM = re.compile(r"context.{0,8}length|too long", re.IGNORECASE)


class ChatTokenizer:
    """Stand-in for the tokenizer of a hosted model: Hugging Face's interface over pieces of four bytes of UTF-8.

    An id is the big-endian number of a byte for the origin (1 inserted, 2 said by the model) and of the piece. Every
    text that has a UTF-8 form comes back exactly; lone surrogates become ``?``. Ids are below 2**34.
    """

    bos_token_id = eos_token_id = chat_template = None
    all_special_tokens: tuple[str, ...] = ()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Ids of inserted text."""
        return {"input_ids": _ids(text, _INSERTED)}

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """Text of ids of any origin."""
        return b"".join(map(_piece, token_ids)).decode("utf-8", "replace")


def said_ids(text: str) -> list[int]:
    """Ids of what the model said; see :class:`ChatTokenizer`."""
    return _ids(text, _SAID)


def to_messages(token_ids: Sequence[int]) -> list[dict[str, str]]:
    """The conversation of these ids: inserted text as user messages, the model's own as assistant messages."""
    parts = groupby(token_ids, key=lambda token: _bytes(token)[:1])
    return [
        {"role": "assistant" if origin == _SAID else "user", "content": ChatTokenizer().decode(list(ids))}
        for origin, ids in parts
    ]


def _ids(text: str, origin: bytes) -> list[int]:
    data = text.encode("utf-8", "replace")
    return [int.from_bytes(origin + data[i : i + _WIDTH], "big") for i in range(0, len(data), _WIDTH)]


def _bytes(token: int) -> bytes:
    return token.to_bytes((token.bit_length() + 7) // 8, "big")


def _piece(token: int) -> bytes:
    return _bytes(token)[1:]


class ChatEngine:
    """An :class:`hiexp.agent.engine.Engine` over ``/chat/completions``. Its log-probabilities are NaN: there are none.

    Limits of new tokens are sent as ``max_tokens`` and count the model's own tokens; all other limits count pieces of
    four bytes. Seeds are not sent, as not every API takes them.

    Args:
        server: where the model is.
    """

    def __init__(self, server: OpenAIServer) -> None:
        self.server, self.tokenizer = server, ChatTokenizer()
        self.context_length = sys.maxsize  # the model's own limit is the server's to tell
        self._refused, self._lock = 0, threading.Lock()

    @property
    def usage(self) -> dict[str, int]:
        """Requests and tokens as the server counts them, replies without such a count, and turns that were refused."""
        return {**self.server.usage, "requests_without_usage": self.server.unmetered, "refused": self._refused}

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> ChatSession:
        """Start one row per prompt of the engine's own tokenizer.

        Raises:
            ValueError: different numbers of prompts and seeds, or an empty prompt.
        """
        check_prompts(prompts, seeds, self.context_length, drawn)
        return ChatSession(self, prompts)

    def count_refusal(self) -> None:
        """A turn was declined or filtered by the provider."""
        with self._lock:
            self._refused += 1


class ChatSession(RemoteSession):
    """Rows of one batch; see :class:`hiexp.agent.remote_session.RemoteSession`."""

    def __init__(self, engine: ChatEngine, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(prompts, engine.context_length, engine.server.concurrency)
        self.engine = engine

    def speaker(self, stop: Sequence[str], sampling: Sampling) -> Callable[[int, int], Generation]:
        """One request a turn."""
        return partial(self._turn, tuple(stop), sampling)

    def _turn(self, stop: tuple[str, ...], sampling: Sampling, row: int, wanted: int) -> Generation:
        if wanted < 1:
            return Generation([], [], "length")
        body = {
            "messages": to_messages(self.tokens[row]), "max_tokens": wanted, "temperature": sampling.temperature,
            **({"top_p": sampling.top_p} if sampling.top_p < 1.0 else {}),
            **({"stop": strings} if (strings := _strings(stop)) else {}),
        }  # fmt: skip
        try:
            choice, text = self.engine.server.chat(body)
        except RefusedError as error:
            if _NO_ROOM.search(str(error)):
                return Generation([], [], "context")
            self.engine.count_refusal()
            return Generation([], [], "eos")
        if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
            self.engine.count_refusal()
        text, reason = finish(text, stop, choice)
        token_ids = said_ids(text)
        return Generation(token_ids, [float("nan")] * len(token_ids), reason)


def finish(text: str, stop: Sequence[str], choice: dict[str, Any]) -> tuple[str, Any]:
    """A turn as the grammar wants it, and why it ended: see :class:`hiexp.agent.engine.Generation`.

    What a server says behind the end of the turn is cut off; the stop string that it swallowed is put back.
    """
    end = turn_end(text, stop)
    if end >= 0:
        return text[:end], "stop"
    reason = choice.get("finish_reason")
    if reason == "length":
        return text, "length"
    swallowed = None if reason == "content_filter" else _swallowed(text, stop, choice)
    return (text, "eos") if swallowed is None else (text + swallowed, "stop")


def turn_end(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string in ``text`` ends, -1 without one. ``x{}``: where the brace of ``x{`` is closed."""
    ends = []
    for string in stop:
        start = text.find(string[:-1] if string.endswith("{}") else string)
        if not string.endswith("{}"):
            ends += [start + len(string)] if start >= 0 else []
            continue
        while start >= 0:
            inside = start + len(string) - 1
            closed = closing_brace(text, inside)
            ends += [closed + 1] if closed >= 0 else []
            start = -1 if closed >= 0 else text.find(string[:-1], inside)
    return min(ends, default=-1)


def _strings(stop: Sequence[str]) -> list[str]:
    """Those that a server can look for; the others stand for groups."""
    return [text for text in stop if not text.endswith("{}")]


def _swallowed(text: str, stop: Sequence[str], choice: dict[str, Any]) -> str | None:
    """The stop string at which the server ended the turn, None where the model ended it."""
    strings = _strings(stop)
    told = choice.get("stop_reason")
    if told in strings:
        return str(told)
    if "stop_reason" in choice and not isinstance(told, str):  # vLLM: null or a token where the model ended
        return None
    opened = {string: text.rfind(opening_tag(string)) for string in strings if opening_tag(string)}
    last = max(opened, key=lambda string: opened[string], default=None)
    return last if last is not None and opened[last] >= 0 else None
