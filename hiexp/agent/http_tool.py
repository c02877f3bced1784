"""Client of a retriever server: the two request schemas that search agents are trained against.

``…/retrieve`` is search_r1's: ``{"queries", "topk", "return_scores"}`` -> ``{"result": [[{"document": {"id",
"contents"}, "score"}]]}`` with ``contents`` = title, newline, text. ``…/queries`` is r1_searcher's: ``{"queries",
"k"}`` -> ``{"answers": [[text]]}``. ``hiexp serve-retriever`` speaks both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hiexp.agent.http_json import ServiceError, check_url, post_json
from hiexp.agent.tools import Document

SCHEMAS = {"/retrieve": "search_r1", "/queries": "r1_searcher"}


class HttpTool:
    """A search tool behind HTTP.

    Args:
        url: ``http://host:port/retrieve`` or ``…/queries``; the path names the schema.
        timeout_s: seconds for one request.
        retries: further attempts after 429, 5xx, a time-out or a broken connection, with growing pauses
            (``Retry-After`` is obeyed).

    Raises:
        ValueError: the URL is no http(s) URL or its path is neither of the two.
    """

    name = "http"
    remote = True

    def __init__(self, url: str, *, timeout_s: float = 10.0, retries: int = 3) -> None:
        path = check_url("url", url).path.rstrip("/")
        if not path.endswith(tuple(SCHEMAS)):
            raise ValueError(f"url: expected http://HOST:PORT/retrieve or …/queries, got {url!r}")
        self.url = url
        self.identity = f"http:{url}"
        self.schema = SCHEMAS["/" + path.rsplit("/", 1)[1]]
        self.timeout_s, self.retries = timeout_s, retries

    def check(self) -> None:
        """Send one query; ServiceError says why the server cannot be used."""
        self.search(["hiexp"], 1)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The server's best ``top_k`` passages of each query, in one request.

        Raises:
            ServiceError: as above; the message names the URL, what came and what was expected.
        """
        if not queries:
            return []
        if self.schema == "search_r1":
            reply = self._post({"queries": list(queries), "topk": top_k, "return_scores": True})
            found = self._lists(reply, "result", len(queries))
        else:
            found = self._lists(self._post({"queries": list(queries), "k": top_k}), "answers", len(queries))
        return [[self._document(one) for one in documents[:top_k]] for documents in found]

    def _post(self, body: dict[str, Any]) -> Any:
        return post_json(self.url, body, timeout_s=self.timeout_s, retries=self.retries)

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
            raise ServiceError(f"{self.url}: expected passages with a string as contents, got {passage!r:.120}")
        title, _, text = contents.partition("\n")
        if not text:
            title, text = "", contents
        known = inner.get("id") if isinstance(inner, dict) else None
        # Strings have no id; their content names them, so that the same passage has the same id on every call.
        identifier = (
            str(known) if known is not None else hashlib.sha256(contents.encode("utf-8", "replace")).hexdigest()[:16]
        )
        return Document(identifier, title.strip().strip('"'), text)
