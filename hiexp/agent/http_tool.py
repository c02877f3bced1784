"""Client of a retriever server: the two request schemas that search agents are trained against.

``…/retrieve`` is search_r1's: ``{"queries", "topk", "return_scores"}`` -> ``{"result": [[{"document": {"id",
"contents"}, "score"}]]}`` with ``contents`` = title, newline, text. ``…/queries`` is r1_searcher's: ``{"queries",
"k"}`` -> ``{"answers": [[text]]}``. ``hiexp serve-retriever`` speaks both.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from hiexp.agent.corpus import is_blank
from hiexp.agent.http_json import JsonClient
from hiexp.agent.http_pool import parallel_map
from hiexp.agent.http_rules import ServiceError, check_url, shown
from hiexp.agent.tools import Document

_BATCH = 64  # queries in one request: a long batch is shared among connections
SCHEMAS = {"/retrieve": "search_r1", "/queries": "r1_searcher"}


class HttpTool:
    """A search tool behind HTTP.

    Args:
        url: ``http://host:port/retrieve`` or ``…/queries``; the path names the schema.
        timeout_s: seconds for one attempt.
        retries: further attempts after 429, 5xx, a time-out or a broken connection, with growing pauses
            (``Retry-After`` is obeyed).
        connections: most requests under way at once; they are kept open between searches.

    Attributes:
        remote: its time is spent waiting, so calls may run beside other work.
        empty_passages: passages without text that servers sent so far; they are left out.

    Raises:
        ValueError: the URL is no http(s) URL or its path is neither of the two.
    """

    name = "http"
    remote = True

    def __init__(self, url: str, *, timeout_s: float = 10.0, retries: int = 3, connections: int = 8) -> None:
        path = check_url("url", url).path.rstrip("/")
        if not path.endswith(tuple(SCHEMAS)):
            raise ValueError(f"url: expected http://HOST:PORT/retrieve or …/queries, got {url!r}")
        self.url = url
        self.identity = f"http:{url}"
        self.schema = SCHEMAS["/" + path.rsplit("/", 1)[1]]
        self.client = JsonClient(url, timeout_s=timeout_s, retries=retries, connections=connections)
        self.empty_passages, self._lock = 0, threading.Lock()

    def check(self) -> None:
        """Send one query; ServiceError says why the server cannot be used."""
        self.search(["hiexp"], 1)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The server's best ``top_k`` passages of each query; batches of up to 64 queries, several at once.

        Raises:
            ServiceError: as above; the message names the URL, what came and what was expected.
        """
        batches = [list(queries[start : start + _BATCH]) for start in range(0, len(queries), _BATCH)]
        found = parallel_map(lambda batch: self._search(batch, top_k), batches, self.client.connections)
        return [documents for batch in found for documents in batch]

    def _search(self, queries: list[str], top_k: int) -> list[list[Document]]:
        if self.schema == "search_r1":
            reply = self.client.post({"queries": queries, "topk": top_k, "return_scores": True})
            found = self._lists(reply, "result", len(queries))
        else:
            found = self._lists(self.client.post({"queries": queries, "k": top_k}), "answers", len(queries))
        documents = [[self._document(one) for one in passages[:top_k]] for passages in found]
        with self._lock:
            self.empty_passages += sum(is_blank(one) for passages in documents for one in passages)
        return [[one for one in passages if not is_blank(one)] for passages in documents]

    def _lists(self, reply: Any, key: str, count: int) -> list[list[Any]]:
        found = reply.get(key) if isinstance(reply, dict) else None
        if not isinstance(found, list) or len(found) != count or not all(isinstance(one, list) for one in found):
            got = f"the keys {sorted(reply)[:8]}" if isinstance(reply, dict) else type(reply).__name__
            size = f", {key} of length {len(found)}" if isinstance(found, list) else ""
            raise ServiceError(f'{self.url}: expected {{"{key}": [{count} lists of passages]}}, got {got}{size}')
        return found

    def _document(self, passage: Any) -> Document:
        """One passage: search_r1's with or without its score, or a string."""
        inner = passage.get("document", passage) if isinstance(passage, dict) else passage
        contents = inner.get("contents", inner.get("text")) if isinstance(inner, dict) else inner
        if not isinstance(contents, str):
            raise ServiceError(f"{self.url}: expected passages with a string as contents, got {shown(passage)}")
        title, _, text = contents.partition("\n")
        if not text:
            title, text = "", contents
        known = inner.get("id") if isinstance(inner, dict) else None
        # Strings have no id; their content names them, so that the same passage has the same id on every call.
        identifier = (
            str(known) if known is not None else hashlib.sha256(contents.encode("utf-8", "replace")).hexdigest()[:16]
        )
        return Document(identifier, title.strip().strip('"'), text)
