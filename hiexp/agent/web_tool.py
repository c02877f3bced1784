"""Web search behind the tool interface: two request schemas, a budget, a rate limit, a key from the environment.

``serper`` is Serper's: POST ``{"q", "num"}`` -> ``{"organic": [{"title", "link", "snippet"}]}``. ``searxng`` is that of
SearxNG's JSON output: GET ``?q=…&format=json`` -> ``{"results": [{"title", "url", "content"}]}``. Snippets are what the
agent reads; pages are not fetched. Record the searches (``tool.record``) to repeat a run: the web changes, calls cost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hiexp.agent.corpus import is_blank
from hiexp.agent.http_json import JsonClient
from hiexp.agent.http_pool import parallel_map
from hiexp.agent.http_rules import ServiceError, shown
from hiexp.agent.tools import Document

_MAX_RESULTS = 100  # Serper's limit for one call


class BudgetError(RuntimeError):
    """No calls are left."""


class _Provider(NamedTuple):
    """``fields``: where a result has its link, title and text."""

    results: str
    fields: tuple[str, str, str]
    default_url: str
    key_header: str | None


PROVIDERS = {
    "serper": _Provider("organic", ("link", "title", "snippet"), "https://google.serper.dev/search", "X-API-KEY"),
    "searxng": _Provider("results", ("url", "title", "content"), "", None),
}


class WebTool:
    """A search tool that asks a web-search provider, one request a query.

    Args:
        provider: ``serper`` or ``searxng``.
        url: where it answers; empty: Serper's public address.
        key_env: environment variable with the key (Serper). The key is read here, sent as a header, never printed.
        max_calls: requests this object may send, repeated attempts included; then :class:`BudgetError`.
        calls_per_second: requests are spaced by at least 1 / calls_per_second.

    Attributes:
        calls: requests sent so far.
        empty_passages: results without title and text, which are left out.

    Raises:
        ValueError: unknown provider, no URL, or no key in the environment.
    """

    name = "web"
    remote = True

    def __init__(
        self,
        provider: str,
        url: str = "",
        *,
        key_env: str = "SERPER_API_KEY",
        max_calls: int = 1000,
        calls_per_second: float = 5.0,
        timeout_s: float = 10.0,
        retries: int = 3,
        connections: int = 8,
    ) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider: expected one of {', '.join(PROVIDERS)}; got {provider!r}")
        if max_calls < 1 or not calls_per_second > 0:
            raise ValueError(
                f"max_calls, calls_per_second: expected at least 1 and above 0, got {max_calls} and {calls_per_second}"
            )
        self._provider = PROVIDERS[provider]
        headers = _key_header(provider, self._provider.key_header, key_env)
        self.client = JsonClient(
            url or self._provider.default_url,
            timeout_s=timeout_s,
            retries=retries,
            connections=connections,
            headers=headers,
            before=self._permit,
        )
        self.identity = f"web:{provider}:{self.client.url}"
        self.max_calls, self.calls, self.empty_passages = max_calls, 0, 0
        self._pause, self._next = 1.0 / calls_per_second, 0.0
        self._lock = threading.Lock()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The provider's best ``top_k`` results of each query.

        Raises:
            ServiceError: the provider fails or answers something else than its schema.
            BudgetError: ``max_calls`` requests were sent.
        """
        return parallel_map(lambda query: self._one(query, top_k), queries, self.client.connections)

    def _one(self, query: str, top_k: int) -> list[Document]:
        if self._provider.key_header is not None:
            reply = self.client.post({"q": query, "num": min(top_k, _MAX_RESULTS)})
        else:
            reply = self.client.get({"q": query, "format": "json"})
        found = reply.get(self._provider.results) if isinstance(reply, dict) else None
        if not isinstance(found, list):
            got = f"the keys {sorted(reply)[:8]}" if isinstance(reply, dict) else type(reply).__name__
            raise ServiceError(f'{self.client.url}: expected {{"{self._provider.results}": […]}}, got {got}')
        documents: dict[str, Document] = {}
        for document in map(self._document, found):
            documents.setdefault(document.id, document)  # a page twice is one document
        kept = [document for document in documents.values() if not is_blank(document)]
        with self._lock:
            self.empty_passages += len(documents) - len(kept)
        return kept[:top_k]

    def _document(self, result: Any) -> Document:
        values: list[Any] = (
            [result.get(field, "") for field in self._provider.fields] if isinstance(result, Mapping) else [None]
        )
        if not values[0] or not all(isinstance(value, str) for value in values):
            wanted = ", ".join(self._provider.fields)
            raise ServiceError(f"{self.client.url}: expected results with strings {wanted}; got {shown(result)}")
        return Document(*values)

    def _permit(self) -> None:
        """Count one request against the budget, and wait for its turn."""
        with self._lock:
            if self.calls >= self.max_calls:
                raise BudgetError(f"web search: all {self.max_calls} calls (tool.max_calls) are spent")
            self.calls += 1
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._pause
        if turn > now:
            time.sleep(turn - now)


def _key_header(provider: str, header: str | None, key_env: str) -> dict[str, str]:
    if header is None:
        return {}
    key = os.environ.get(key_env, "")
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"tool.key_env: expected a key for {provider} in the environment variable {key_env!r}")
    return {header: key}
