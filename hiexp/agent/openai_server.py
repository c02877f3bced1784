"""What the two clients of an OpenAI-compatible server share: its address, its key, many requests side by side.

The key comes from an environment variable only, and is never written or shown.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hiexp.agent.http_json import post_json
from hiexp.agent.http_rules import RefusedError, ServiceError, check_url, shown

_COUNTS = ("prompt_tokens", "completion_tokens")
_CHAT = "/chat/completions"
DEFAULT_URL = "http://127.0.0.1:8000/v1"  # where `vllm serve` listens


class OpenAIServer:
    """One model behind an OpenAI-compatible HTTP API.

    Args:
        model: its name on the server.
        url: base URL, ending in ``/v1``; None takes ``OPENAI_BASE_URL``, else a local server.
        key_variable: environment variable that holds the key; unset means no key.
        concurrency: requests in flight at once.
        timeout_s: seconds for one request. retries: see :func:`hiexp.agent.http_json.JsonClient`.

    ``usage`` counts requests, prompt tokens and completion tokens as the server reports them; ``unmetered`` the
    requests whose tokens it did not report.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 300.0,
        retries: int = 5,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        check_url("url", self.url)
        self.model, self.key_variable = model, key_variable
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self.usage = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self.unmetered = 0
        self._lock = threading.Lock()
        self._chats = False  # whether a chat was ever answered

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request to ``path`` (``/completions``); the first choice's object, with its usage counted.

        Raises:
            ServiceError: as :func:`post_json`, or an answer without choices.
        """
        reply = post_json(
            self.url + path, {"model": self.model, **body}, timeout_s=self.timeout_s, retries=self.retries,
            headers=self.headers(),
        )  # fmt: skip
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ServiceError(f"{self.url}{path}: expected an answer with choices, got {self.shown(reply)}")
        self._count(reply.get("usage"))
        choice: dict[str, Any] = choices[0]
        return choice

    def chat(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """One request to ``/chat/completions``: the first choice, and its text.

        A message without text, as models give that decline or spend all tokens on thoughts, has that of its ``refusal``
        or none.

        Raises:
            RefusedError: the server takes such requests, but not these messages. ServiceError: as :meth:`post`, or it
                takes no request with these settings.
        """
        try:
            choice = self.post(_CHAT, body)
        except RefusedError as error:
            if not self._takes(body):
                raise ServiceError(str(error)) from error
            raise
        self._chats = True
        message = choice.get("message")
        if isinstance(message, dict):
            text = message.get("content")
            text = message.get("refusal") or "" if text is None else text
            if isinstance(text, str):
                return choice, text
        raise ServiceError(f"{self.url}{_CHAT}: expected a message with text, got {self.shown(message)}")

    def _takes(self, body: Mapping[str, Any]) -> bool:
        """Whether the settings of ``body`` are answered with harmless messages; asked only while nothing else was."""
        if not self._chats:
            try:
                self.post(_CHAT, {**body, "messages": [{"role": "user", "content": "Say yes."}]})
            except RefusedError:
                return False
            self._chats = True
        return True

    def headers(self) -> dict[str, str]:
        """The header that carries the key, if there is one."""
        key = os.environ.get(self.key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def shown(self, value: object) -> str:
        """The beginning of what this server sent, without its key."""
        return shown(value, [os.environ.get(self.key_variable) or ""])

    def _count(self, usage: Any) -> None:
        with self._lock:
            self.usage["requests"] += 1
            counts = [usage.get(key) if isinstance(usage, dict) else None for key in _COUNTS]
            self.unmetered += not all(isinstance(count, int) for count in counts)
            for key, count in zip(_COUNTS, counts, strict=True):
                self.usage[key] += count if isinstance(count, int) else 0

    def map(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """``ask`` of every item, ``concurrency`` at a time, results in order; the first error is raised at the end.

        Requests that were not sent when one failed are not sent any more.
        """
        if not items:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(items))) as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class OpenAIChat:
    """Replies of a chat model: a teacher that reflects, or a judge. A function from prompts to replies.

    Args:
        server: where the model is.
        max_tokens: most tokens of a reply. temperature: 0 is greedy.
    """

    def __init__(self, server: OpenAIServer, *, max_tokens: int = 1024, temperature: float = 0.0) -> None:
        self.server, self.max_tokens, self.temperature = server, max_tokens, temperature

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """One reply per prompt, in order.

        A prompt that the model or its provider declines has a reply too, which no caller can use: what was said
        instead, or nothing. The replies to the others are not lost with it.
        """
        return self.server.map(self._reply, prompts)

    @property
    def usage(self) -> dict[str, int]:
        """Requests, prompt tokens and completion tokens so far."""
        return self.server.usage

    def _reply(self, prompt: str) -> str:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        try:
            return self.server.chat(body)[1]
        except RefusedError as error:
            return f"(no reply: {error})"
