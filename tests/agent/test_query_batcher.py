"""Requests that wait together are searched together; each gets its own answer, whatever the others do."""

from __future__ import annotations

import threading

import pytest

from hiexp.agent.query_batcher import BusyError, QueryBatcher

GATE_S = 20.0


class GatedTool:
    """Answers with the query itself; every search waits for the gate and is remembered."""

    name = "gated"

    def __init__(self):
        self.gate, self.entered, self.batches = threading.Semaphore(0), threading.Semaphore(0), []

    def search_scored(self, queries, top_k):
        self.entered.release()
        assert self.gate.acquire(timeout=GATE_S)
        self.batches.append((list(queries), top_k))
        if "bad" in queries:
            raise KeyError("bad")
        return [[(query, top_k)] for query in queries]


class Callers:
    """Threads that ask, in a known order."""

    def __init__(self, batcher):
        self.batcher, self.threads, self.results = batcher, [], []

    def ask(self, queries, top_k=1):
        place = len(self.results)
        self.results.append(None)

        def work():
            try:
                self.results[place] = self.batcher.search(queries, top_k)
            except Exception as error:
                self.results[place] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(GATE_S)
        return self.results


@pytest.fixture
def gated():
    tool = GatedTool()
    batcher = QueryBatcher(tool, max_waiting=10)
    yield tool, batcher, Callers(batcher)
    tool.gate.release(100)
    batcher.close()


def waits(batcher, count):
    """Until ``count`` queries are in the queue."""
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: batcher.waiting == count, GATE_S)


def test_what_waits_goes_together_by_top_k(gated):
    tool, batcher, callers = gated
    callers.ask(["first"])
    assert tool.entered.acquire(timeout=GATE_S)
    for count, (queries, top_k) in enumerate([(["a"], 1), (["b"], 2), (["c"], 1)], start=1):
        callers.ask(queries, top_k)
        waits(batcher, count)
    tool.gate.release(100)
    assert callers.join() == [[[("first", 1)]], [[("a", 1)]], [[("b", 2)]], [[("c", 1)]]]
    assert tool.batches == [(["first"], 1), (["a", "c"], 1), (["b"], 2)]
    assert (batcher.searches, batcher.queries) == (3, 4)


def test_one_bad_query_does_not_spoil_the_others(gated):
    tool, batcher, callers = gated
    callers.ask(["first"])
    assert tool.entered.acquire(timeout=GATE_S)
    for count, query in enumerate(["a", "bad", "c"], start=1):
        callers.ask([query])
        waits(batcher, count)
    tool.gate.release(100)
    first, good, bad, other = callers.join()
    assert (first, good, other) == ([[("first", 1)]], [[("a", 1)]], [[("c", 1)]])
    assert isinstance(bad, KeyError)


def test_a_full_queue_refuses_and_a_closed_one_too(gated):
    tool, batcher, callers = gated
    callers.ask(["first"])
    assert tool.entered.acquire(timeout=GATE_S)
    callers.ask(["q"] * 30)  # larger than the limit, but nothing waits
    waits(batcher, 30)
    with pytest.raises(BusyError, match="30 queries wait already, the limit is 10"):
        batcher.search(["more"], 1)
    assert batcher.refused == 1
    tool.gate.release(100)
    batcher.close()
    assert [len(found) for found in callers.join()] == [1, 30]
    with pytest.raises(BusyError):
        batcher.search(["late"], 1)


def test_a_tool_that_breaks_its_promise_is_named():
    class Short:
        name = "short"

        def search_scored(self, queries, top_k):
            return []

    batcher = QueryBatcher(Short(), 10)
    with pytest.raises(ValueError, match="short: expected 1 lists of documents, got 0"):
        batcher.search(["a"], 1)
    batcher.close()
