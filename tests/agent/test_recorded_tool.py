"""A recording gives what the tool gave, asks it once per query, and replays without it."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.agent.recorded_tool import RecordedTool
from hiexp.agent.tools import Document, call_tool
from hiexp.io import DataError
from hiexp.rl.config import ToolConfig
from hiexp.rl.setup import make_tool


class Counting:
    """Echoes queries as documents and remembers what it was asked."""

    name = "counting"

    def __init__(self):
        self.asked = []

    def search(self, queries, top_k):
        self.asked += queries
        return [[Document(f"{query}-{i}", query, f"text {i}\n☃") for i in range(top_k)] for query in queries]


class Broken:
    name = "counting"

    def search(self, queries, top_k):
        raise OSError("down")


def test_each_query_is_asked_once_and_order_is_kept(tmp_path):
    tool = Counting()
    recorded = RecordedTool(tmp_path / "r.sqlite", tool)
    queries = ["b", "a", "b", ""]
    assert recorded.search(queries, 2) == Counting().search(queries, 2)
    assert recorded.search(queries, 2) == Counting().search(queries, 2)
    assert tool.asked == ["b", "a", ""]
    assert (recorded.hits, recorded.misses) == (3, 3)
    recorded.search(["a"], 3)  # another top_k is another search
    assert tool.asked[3:] == ["a"]


def test_replay_needs_no_tool_and_names_what_is_missing(tmp_path):
    path = tmp_path / "r.sqlite"
    RecordedTool(path, Counting()).search(["a", "ünï\ud800"], 2)
    replayed = RecordedTool(path)
    assert replayed.name == "counting"
    assert replayed.search(["ünï\ud800", "a"], 2) == Counting().search(["ünï\ud800", "a"], 2)
    with pytest.raises(LookupError, match="no recorded search of 'c' with top_k=2"):
        replayed.search(["a", "c"], 2)
    known, unknown = call_tool(replayed, ["a", "c"], 2, timeout_s=10.0)
    assert (known.status, unknown.status) == ("ok", "error")
    assert make_tool(ToolConfig(kind="replay", record=str(path))).search(["a"], 2) == Counting().search(["a"], 2)


def test_another_corpus_is_another_recording(tmp_path):
    first, second = Counting(), Counting()
    first.identity, second.identity = "counting:1", "counting:2"
    RecordedTool(tmp_path / "r.sqlite", first).search(["a"], 1)
    RecordedTool(tmp_path / "r.sqlite", second).search(["a"], 1)
    assert (first.asked, second.asked) == (["a"], ["a"])
    with pytest.raises(DataError, match=r"one.*counting:1.*counting:2"):
        RecordedTool(tmp_path / "r.sqlite")
    assert RecordedTool(tmp_path / "r.sqlite", name="counting:2").search(["a"], 1)


def test_failures_are_not_recorded(tmp_path):
    with pytest.raises(OSError, match="down"):
        RecordedTool(tmp_path / "r.sqlite", Broken()).search(["a"], 1)
    assert RecordedTool(tmp_path / "r.sqlite", Counting()).search(["a"], 1) == Counting().search(["a"], 1)


def test_threads_share_a_recording(tmp_path):
    recorded = RecordedTool(tmp_path / "r.sqlite", Counting())
    found = {}

    def ask(i):
        found[i] = recorded.search([f"q{i % 5}", f"q{i}"], 1)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: Counting().search([f"q{i % 5}", f"q{i}"], 1) for i in range(20)}
    assert RecordedTool(tmp_path / "r.sqlite").search([f"q{i}" for i in range(20)], 1)


@given(st.lists(st.text(st.characters(), max_size=8), max_size=6))
def test_any_text_survives(tmp_path_factory, queries):
    path = tmp_path_factory.mktemp("recording") / "r.sqlite"
    expected = Counting().search(queries, 1)
    assert RecordedTool(path, Counting()).search(queries, 1) == expected
    if queries:
        assert RecordedTool(path).search(queries, 1) == expected


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.sqlite").write_text("not a database " * 100, encoding="utf-8")
    for path, words in ((tmp_path / "none.sqlite", "no such recording"), (tmp_path / "text.sqlite", "SQLite")):
        with pytest.raises(DataError, match=words):
            RecordedTool(path)
    RecordedTool(tmp_path / "empty.sqlite", Counting()).close()
    with pytest.raises(DataError, match="expected the recording of tool"):
        RecordedTool(tmp_path / "empty.sqlite")
    with pytest.raises(ValueError, match=r"tool\.record: expected the file of a recording"):
        make_tool(ToolConfig(kind="replay"))
