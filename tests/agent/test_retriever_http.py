"""Server and client together give what the tool itself gives; faults end in clear, recorded errors."""

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from hiexp.agent.bm25 import Bm25Tool
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.http_tool import HttpTool
from hiexp.agent.retriever_server import RetrieverServer
from hiexp.agent.tools import call_tool
from hiexp.rl.config import ToolConfig
from hiexp.rl.setup import make_tool

pytest.importorskip("bm25s")
PASSAGES = [
    {"id": "a", "title": "Ada Lovelace", "text": "Ada Lovelace wrote the first program.\nIt computed numbers."},
    {"id": "b", "title": "Analytical Engine", "text": "A machine by Charles Babbage, never built."},
    {"id": "c", "title": "Größe – Ünïcode ☃", "text": "Ein Text über Größe und Maschinen."},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tool(corpus):
    return Bm25Tool.from_corpus(corpus, corpus.parent / "cache")


def running(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def address(tool):
    with RetrieverServer(tool, port=0) as server:
        yield running(server)
        server.shutdown()


def post(url, body, data=None):
    request = urllib.request.Request(url, data if data is not None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize("top_k", [1, 3])
def test_search_r1_schema_gives_the_tools_documents(tool, address, top_k):
    queries = ["first program", "machine never built", "größe", "nothing like it"]
    assert HttpTool(f"{address}/retrieve").search(queries, top_k) == tool.search(queries, top_k)


def test_r1_searcher_schema_gives_the_same_texts(tool, address):
    queries = ["first program", "größe"]
    found = HttpTool(f"{address}/queries").search(queries, 2)
    assert [[(d.title, d.text) for d in one] for one in found] == [
        [(d.title, d.text) for d in one] for one in tool.search(queries, 2)
    ]
    again = HttpTool(f"{address}/queries").search(queries, 2)
    assert [[d.id for d in one] for one in again] == [[d.id for d in one] for one in found]


def test_bytes_on_the_wire_are_search_r1s(tool, address):
    status, reply = post(f"{address}/retrieve", {"queries": ["first program"], "topk": 1, "return_scores": True})
    score = tool.search_scored(["first program"], 1)[0][0][1]
    contents = f"{PASSAGES[0]['title']}\n{PASSAGES[0]['text']}"
    assert (status, reply) == (200, {"result": [[{"document": {"id": "a", "contents": contents}, "score": score}]]})
    _, plain = post(f"{address}/retrieve", {"queries": ["first program"], "topk": 1})
    assert plain == {"result": [[{"id": "a", "contents": contents}]]}
    _, answers = post(f"{address}/queries", {"queries": ["first program"], "k": 1})
    assert answers == {"queries": ["first program"], "answers": [[contents]]}


def test_health_counts_queries(address):
    with urllib.request.urlopen(f"{address}/health", timeout=10) as response:
        before = json.loads(response.read())
    post(f"{address}/queries", {"queries": ["a", "b"]})
    with urllib.request.urlopen(f"{address}/health", timeout=10) as response:
        after = json.loads(response.read())
    assert after == {**before, "queries": before["queries"] + 2, "searches": before["searches"] + 1}
    assert (after["tool"], after["passages"], after["waiting"]) == ("bm25", 3, 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"queries": "one"}, ["queries", "list of strings", "'one'"]),
        ({"queries": ["a", 3]}, ["queries", "list of strings"]),
        ({}, ["queries", "None"]),
        ({"queries": ["a"], "topk": 0}, ["topk", "1..1000", "0"]),
        ({"queries": ["a"], "topk": True}, ["topk", "True"]),
        ({"queries": ["a"], "return_scores": 1}, ["return_scores", "1"]),
        ({"queries": ["a"] * 5000}, ["queries", "4096", "5000"]),
        (["a"], ["body", "list"]),
    ],
)
def test_bad_requests_are_named(address, body, words):
    status, reply = post(f"{address}/retrieve", body)
    assert status == 400
    for word in words:
        assert word in reply["error"]


def test_half_a_json_and_unknown_routes(address):
    assert post(f"{address}/retrieve", None, b'{"queries": ["a"')[0] == 400
    status, reply = post(f"{address}/search", {"queries": ["a"]})
    assert status == 404
    assert "POST /retrieve" in reply["error"]


def test_many_clients_at_once_get_their_own_answers(tool, address):
    queries = ["first program", "machine never built", "größe"] * 8
    found = [None] * len(queries)

    def ask(i):
        found[i] = HttpTool(f"{address}/retrieve").search([queries[i]], 2)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == tool.search(queries, 2)


def test_a_request_under_way_is_answered_before_the_server_ends(tool):
    entered, gate = threading.Event(), threading.Event()

    class Slow:
        name, documents = "slow", tool.documents

        def search_scored(self, queries, top_k):
            entered.set()
            assert gate.wait(20)
            return tool.search_scored(queries, top_k)

    found = []
    with RetrieverServer(Slow(), port=0) as server:
        url = f"{running(server)}/retrieve"
        client = HttpTool(url)
        caller = threading.Thread(target=lambda: found.extend(client.search(["first program"], 1)))
        caller.start()
        assert entered.wait(20)
        server.shutdown()
        assert not server.drain(timeout_s=0.0)
        gate.set()
        assert server.drain()
    caller.join(20)
    assert found == tool.search(["first program"], 1)
    assert client.client._pool._free == []  # told that the connection ends


def test_a_full_server_says_when_to_come_back(tool, monkeypatch):
    with RetrieverServer(tool, port=0) as server:
        monkeypatch.setattr(server.searches, "waiting", 100_000)
        url = f"{running(server)}/retrieve"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url, b'{"queries": ["a"]}'), timeout=10)
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (503, "1")
        assert post(url, {"queries": []}) == (200, {"result": []})
        server.shutdown()


def test_too_long_and_too_nested_bodies_are_refused(address):
    assert post(f"{address}/retrieve", None, b"[" * 100_000)[0] == 400
    request = urllib.request.Request(f"{address}/retrieve", b"{}", {"Content-Length": str(1 << 30)})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 400


@pytest.fixture
def scripted(http_server):
    """A client of a server that says what the test wants."""

    def start(*replies):
        server = http_server(*replies)
        return HttpTool(f"{server.url}/retrieve", timeout_s=5.0), server

    return start


GOOD = json.dumps({"result": [[{"document": {"id": 7, "contents": '"T"\ntext'}, "score": 1.5}]]}).encode()


def test_busy_server_is_asked_again_with_growing_pauses(scripted):
    tool, server = scripted((500, b"oops"), (503, b""), (429, b"", {"Retry-After": "3"}), (200, GOOD))
    (document,) = tool.search(["q"], 3)[0]
    assert (document.id, document.title, document.text) == ("7", "T", "text")
    assert server.pauses == [0.2, 0.4, 3.0]


@pytest.mark.parametrize(
    ("reply", "asked", "words"),
    [
        ((500, b"broken"), 4, ["4 attempts", "status 500", "broken"]),
        ((404, b"no such route"), 1, ["status 404", "no such route"]),
        ((200, b'{"result": [['), 4, ["4 attempts", "not valid JSON", "result"]),
        ((200, b"<html>"), 1, ["expected JSON", "html"]),
        ((200, b'{"answers": []}'), 1, ["result", "answers"]),
        ((200, b'{"result": [[], []]}'), 1, ["1 lists", "length 2"]),
        ((200, b'{"result": [[{"document": {"id": 1}}]]}'), 1, ["contents", "document"]),
        ((200, b"[]"), 1, ["result", "list"]),
        ((200, b'{"result": ', {"Content-Length": "4000", "Connection": "close"}), 4, ["4 attempts", "IncompleteRead"]),
    ],
)
def test_faults_are_errors_with_the_url(scripted, reply, asked, words):
    tool, server = scripted(reply)
    with pytest.raises(ServiceError) as caught:
        tool.search(["q"], 3)
    assert len(server.requests) == asked
    for word in [tool.url, *words]:
        assert word in str(caught.value)
    # In a rollout the same fault is a record, not an exception.
    (result,) = call_tool(tool, ["q"], 3, timeout_s=30.0)
    assert result.status == "error"
    assert tool.url in result.error


def test_no_server_is_found_before_training(monkeypatch):
    monkeypatch.setattr("hiexp.agent.http_rules.time.sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/retrieve"
    with pytest.raises(ServiceError, match=f"{url}: no answer in 4 attempts"):
        make_tool(ToolConfig(kind="http", url=url))


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/retrieve", "file:///retrieve", "http://host", "http://host/search"]
)
def test_bad_urls_are_named(url):
    with pytest.raises(ValueError, match="url: expected http://HOST:PORT/"):
        HttpTool(url)


def test_command_serves_until_it_is_stopped(corpus):
    command = [sys.executable, "-m", "hiexp.cli", "serve-retriever", "--corpus", str(corpus), "--port", "0"]
    with subprocess.Popen(
        [*command, "--cache-dir", str(corpus.parent / "cache")], stdout=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("3 passages (bm25) at http://127.0.0.1:")
        found = HttpTool(line.split()[4]).search(["first program"], 1)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert found[0][0].id == "a"
    assert rest == "stopped after 1 queries\n"
    assert process.returncode == 0


def test_an_index_is_built_ahead_and_served(corpus, tmp_path, capsys):
    from hiexp.cli import main

    out = str(tmp_path / "index")
    assert main(["index", str(corpus), "--out", out, "--encoder", "hashing:64", "--shard-size", "2"]) == 0
    assert f"{out}: 3 passages, " in capsys.readouterr().out
    command = [
        sys.executable,
        "-m",
        "hiexp.cli",
        "serve-retriever",
        "--index",
        out,
        "--port",
        "0",
        "--cached-queries",
        "9",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("3 passages (dense) at http://127.0.0.1:")
        client = HttpTool(line.split()[4])
        found = [client.search(["first program"], 2) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert (
        found[0]
        == found[1]
        == make_tool(ToolConfig(kind="dense", index=out, encoder="hashing:64")).search(["first program"], 2)
    )
    assert rest == "stopped after 2 queries, 1 of them from the cache\n"
    assert main(["serve-retriever", "--index", out, "--kind", "bm25"]) == 2
    assert "kind 'dense'; wanted kind 'bm25'" in capsys.readouterr().err
    assert main(["index", str(corpus), "--out", out, "--kind", "bm25"]) == 2
    assert "kind 'dense'; wanted kind 'bm25'" in capsys.readouterr().err
    assert main(["index", str(corpus), "--out", out, "--kind", "bm25", "--dtype", "float16"]) == 2
    assert "--dtype: belongs to dense indexes" in capsys.readouterr().err
    assert main(["serve-retriever"]) == 2
    assert main(["serve-retriever", "--corpus", str(corpus), "--method", "ivf"]) == 2
    assert f"--method: belongs to dense search, but {corpus} is searched by bm25" in capsys.readouterr().err
    assert main(["serve-retriever", "--index", out, "--effort", "3"]) == 2
    assert "--effort: belongs to --method ivf and hnsw, got exact" in capsys.readouterr().err
    bm25 = str(tmp_path / "bm25")
    assert main(["index", str(corpus), "--out", bm25, "--kind", "bm25"]) == 0
    for flag, value in (("--method", "exact"), ("--encoder", "hashing"), ("--effort", "3")):
        assert main(["serve-retriever", "--index", bm25, flag, value]) == 2
        assert f"{flag}: belongs to dense search, but {bm25} is searched by bm25" in capsys.readouterr().err


def test_command_names_a_bad_corpus(tmp_path, capsys):
    from hiexp.cli import main

    assert main(["serve-retriever", "--corpus", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
