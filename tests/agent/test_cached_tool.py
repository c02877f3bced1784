"""The query cache gives what the tool gives, asks each query once, and forgets the least recently used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.agent.cached_tool import CachedTool
from hiexp.agent.tools import Document


class EchoTool:
    name, remote, documents = "echo", True, range(7)

    def __init__(self):
        self.asked = []

    def search(self, queries, top_k):
        self.asked += queries
        return [[Document(f"{query}{i}", "", query) for i in range(top_k)] for query in queries]

    def search_scored(self, queries, top_k):
        return [[(document, 1.0) for document in found] for found in self.search(queries, top_k)]


@given(
    searches=st.lists(st.tuples(st.lists(st.sampled_from("abcdef"), max_size=5), st.integers(1, 2)), max_size=12),
    size=st.integers(1, 6),
)
def test_answers_are_the_tools_own_and_every_query_is_counted(searches, size):
    tool, plain = EchoTool(), EchoTool()
    cached = CachedTool(tool, size)
    for queries, top_k in searches:
        assert cached.search(queries, top_k) == plain.search(queries, top_k)
        assert len(cached._kept) <= size
    assert cached.misses == len(tool.asked)
    assert cached.hits + cached.misses == sum(len(set(queries)) for queries, _ in searches)


def test_the_least_recently_used_leaves_first():
    tool = EchoTool()
    cached = CachedTool(tool, 2)
    for query in ("a", "b", "a", "c", "a", "b"):
        cached.search([query], 1)
    assert tool.asked == ["a", "b", "c", "b"]
    assert (cached.hits, cached.misses) == (2, 4)


def test_failures_are_not_kept_and_callers_cannot_change_what_is(monkeypatch):
    tool = EchoTool()
    cached = CachedTool(tool, 5)
    with monkeypatch.context() as patch:
        patch.setattr(tool, "search", lambda queries, top_k: [])
        with pytest.raises(ValueError, match="echo: expected 1 lists of documents, got 0"):
            cached.search(["a"], 1)
    cached.search(["a"], 1)[0].clear()
    assert cached.search(["a"], 1)[0]
    assert cached.search_scored(["a"], 1)[0][0][1] == 1.0
    assert (cached.remote, cached.identity, len(cached.documents)) == (True, "echo", 7)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        CachedTool(tool, 0)
