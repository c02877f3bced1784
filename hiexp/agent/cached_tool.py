"""Results of any search tool kept in memory, the least recently used leaving first; hits are counted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from hiexp.agent.tools import Document, Tool


class CachedTool:
    """A search tool that answers repeated queries from memory and asks ``tool`` for the rest in one batch.

    Failures are not kept. Threads may share it; two that miss the same query at once both ask.

    Args:
        size: most results kept, one per query and ``top_k``.

    Attributes:
        hits, misses: distinct queries answered from memory, and asked.
    """

    def __init__(self, tool: Tool, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.tool, self.size = tool, size
        self.name = tool.name
        self.identity = getattr(tool, "identity", tool.name)
        self.remote: bool = getattr(tool, "remote", False)
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[str, str, int], list[Any]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def documents(self) -> Any:
        """Those of the tool behind it."""
        return self.tool.documents  # type: ignore[attr-defined]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """As the tool behind it."""
        return self._answer("search", queries, top_k)

    def search_scored(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Document, float]]]:
        """As the tool behind it, which must have scores."""
        return self._answer("search_scored", queries, top_k)

    def _answer(self, method: str, queries: Sequence[str], top_k: int) -> list[list[Any]]:
        distinct = list(dict.fromkeys(queries))
        with self._lock:
            known = {query: self._kept[key] for query in distinct if (key := (method, query, top_k)) in self._kept}
            for query in known:
                self._kept.move_to_end((method, query, top_k))
            self.hits += len(known)
            self.misses += len(distinct) - len(known)
        missing = [query for query in distinct if query not in known]
        if missing:
            found = getattr(self.tool, method)(missing, top_k)
            if len(found) != len(missing):
                raise ValueError(f"{self.name}: expected {len(missing)} lists of documents, got {len(found)}")
            known |= zip(missing, found, strict=True)
            self._keep(method, top_k, {query: known[query] for query in missing})
        return [list(known[query]) for query in queries]

    def _keep(self, method: str, top_k: int, found: dict[str, list[Any]]) -> None:
        with self._lock:
            for query, result in found.items():
                self._kept[method, query, top_k] = result
                self._kept.move_to_end((method, query, top_k))
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
