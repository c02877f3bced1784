"""The JSON client against a loopback server that misbehaves, byte by byte."""

from __future__ import annotations

import json
import socket
import threading
from email.utils import formatdate

import pytest

from hiexp.agent import http_pool
from hiexp.agent.http_json import ServiceError
from hiexp.agent.http_pool import JsonClient, parallel_map
from hiexp.agent.http_tool import HttpTool
from hiexp.agent.tools import call_tool


def answer(body, status="200 OK", headers=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


class RawServer:
    """Gives its replies in turn, the last for ever: bytes to send, or a function of the socket. Counts connections."""

    def __init__(self, *replies):
        self.replies, self.requests, self.connections = replies, [], 0
        self.release = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/retrieve"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                headers = {}
                while (row := stream.readline().strip()) != b"":
                    name, _, value = row.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                body = stream.read(int(headers.get("content-length", 0)))
                with self._lock:
                    reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
                    self.requests.append((line.decode().split()[1], headers, body))
                if callable(reply):
                    reply(self, connection)
                    return
                connection.sendall(reply)

    def close(self):
        self.release.set()
        self._listener.close()


@pytest.fixture
def serve(monkeypatch):
    pauses, servers = [], []
    monkeypatch.setattr(http_pool.time, "sleep", pauses.append)

    def start(*replies):
        server = RawServer(*replies)
        server.pauses = pauses
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


def client(server, **options):
    return JsonClient(server.url, **{"timeout_s": 5.0, "retries": 2, "connections": 4, **options})


def hangs(server, connection):
    server.release.wait(30)


def breaks_off(server, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")


def says_nothing(server, connection):
    connection.shutdown(socket.SHUT_RDWR)


def test_one_connection_serves_many_requests(serve):
    server = serve(answer({"ok": 1}))
    one = client(server)
    assert [one.post({"n": n}) for n in range(20)] == [{"ok": 1}] * 20
    assert server.connections == 1
    assert [json.loads(body)["n"] for _, _, body in server.requests] == list(range(20))
    assert (one.requests, one.retried) == (20, 0)
    one.close()
    one.post({})
    assert server.connections == 2


def test_a_connection_that_the_server_closed_is_replaced_at_once(serve):
    server = serve(answer({"ok": 1}), says_nothing, answer({"ok": 2}))
    one = client(server, retries=0)
    assert one.post({}) == {"ok": 1}
    assert one.post({}) == {"ok": 2}
    assert server.pauses == []


def test_requests_run_at_once_but_no_more_than_allowed(serve):
    """Replies come when three requests have arrived: with fewer at once this would never end."""
    together = threading.Barrier(3, timeout=20)
    under_way, most, lock = [0], [0], threading.Lock()

    def gather(server, connection):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait()
        with lock:
            under_way[0] -= 1
        connection.sendall(answer({"ok": 1}, headers="Connection: close\r\n"))

    one = client(serve(gather), connections=3)
    assert parallel_map(lambda n: one.post({"n": n}), range(12), 6) == [{"ok": 1}] * 12
    assert most == [3]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (says_nothing, ["3 attempts"]),
        (breaks_off, ["3 attempts", "IncompleteRead"]),
        (b"not http at all\r\n\r\n", ["3 attempts", "BadStatusLine"]),
        (answer(b"busy", "500 Internal Server Error"), ["3 attempts", "status 500", "busy"]),
        (answer(b"", "504 Gateway Timeout"), ["3 attempts", "status 504"]),
        (answer(b'{"result": [['), ["3 attempts", "not valid JSON", "result"]),
        (answer(b"[" * 100_000), ["3 attempts", "not valid JSON"]),
    ],
)
def test_passing_faults_are_tried_again_then_named(serve, fault, words):
    server = serve(fault)
    with pytest.raises(ServiceError) as caught:
        client(server).post({})
    for word in [server.url, *words]:
        assert word in str(caught.value)
    assert server.pauses == [0.2, 0.4]
    recovering = serve(fault, fault, answer({"ok": 1}))
    assert client(recovering).post({}) == {"ok": 1}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (answer(b"\xff\xfe"), ["expected JSON"]),
        (answer(b"who?", "401 Unauthorized"), ["status 401", "who?"]),
        (answer(b"", "301 Moved Permanently", "Location: http://elsewhere/\r\n"), ["status 301"]),
    ],
)
def test_lasting_faults_are_named_at_once(serve, fault, words):
    server = serve(fault)
    with pytest.raises(ServiceError) as caught:
        client(server).post({})
    for word in [server.url, *words]:
        assert word in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_hangs_or_drips_is_left_after_the_time_limit(serve):
    def drips(server, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not server.release.wait(0.02):
            connection.sendall(b" ")

    for fault, word in ((hangs, "TimeoutError"), (drips, "not complete in time")):
        with pytest.raises(ServiceError, match=word):
            client(serve(fault), timeout_s=0.2, retries=0).post({})


def test_an_endless_answer_is_left(serve, monkeypatch):
    monkeypatch.setattr(http_pool, "_MAX_REPLY_BYTES", 1000)
    with pytest.raises(ServiceError, match="more than 1000 bytes"):
        client(serve(answer(b" " * 5000)), retries=0).post({})


def test_retry_after_is_obeyed_as_seconds_and_as_a_date(serve, monkeypatch):
    monkeypatch.setattr(http_pool.time, "time", lambda: 1_000_000_000.0)
    date = formatdate(1_000_000_007, usegmt=True)
    replies = [
        answer(b"", "429 Too Many Requests", f"Retry-After: {value}\r\n") for value in ("3", date, "900", "soon")
    ]
    server = serve(*replies, answer({"ok": 1}))
    assert client(server, retries=4).post({}) == {"ok": 1}
    assert server.pauses == [3.0, 7.0, 20.0, 1.6]


def test_secrets_never_come_back_in_messages(serve):
    server = serve(answer(b"the key sk-secret is wrong", "403 Forbidden"))
    with pytest.raises(ServiceError) as caught:
        client(server, headers={"X-API-KEY": "sk-secret"}, secrets=["sk-secret"]).post({})
    assert server.requests[0][1]["x-api-key"] == "sk-secret"
    assert "sk-secret" not in str(caught.value)
    assert "the key *** is wrong" in str(caught.value)


def test_large_batches_are_split_and_keep_their_order(serve):
    def echo(server, connection):
        queries = json.loads(server.requests[-1][2])["queries"]
        connection.sendall(answer({"result": [[{"id": q, "contents": f"t\n{q}"}] for q in queries]}))

    server = serve(echo)
    tool = HttpTool(server.url, connections=1)
    queries = [f"q{i}" for i in range(150)]
    assert [one.text for (one,) in tool.search(queries, 1)] == queries
    assert [len(json.loads(body)["queries"]) for _, _, body in server.requests] == [64, 64, 22]
    assert tool.remote


UNICODE = [
    "\ud800 lone",
    "\u202eright to left",
    "zero\u200bwidth",
    "nul\x00",
    "e\u0301",
    "\U0001f469\u200d\U0001f680",
    "\uffff",
    "",
]


def test_unicode_of_every_kind_goes_there_and_comes_back(serve):
    passages = [[{"id": i, "contents": f"T\n{text}"}] for i, text in enumerate(UNICODE)]
    server = serve(answer({"result": passages}))
    tool = HttpTool(server.url)
    results = call_tool(tool, UNICODE, 3, timeout_s=20.0)
    assert json.loads(server.requests[0][2])["queries"] == UNICODE
    assert [one.status for one in results] == ["ok"] * len(UNICODE)
    for result in results:
        result.documents[0].text.encode("utf-8")  # what a tokenizer will do
    assert results[1].documents[0].text == UNICODE[1]


def test_empty_passages_are_left_out_and_counted(serve):
    passages = [{"id": 1, "contents": "\n"}, {"id": 2, "contents": "T\ntext"}, {"id": 3, "contents": "\u200b\x00 "}]
    tool = HttpTool(serve(answer({"result": [passages]})).url)
    (result,) = call_tool(tool, ["q"], 3, timeout_s=20.0)
    assert [document.id for document in result.documents] == ["2"]
    assert tool.empty_passages == 2
    (none,) = call_tool(HttpTool(serve(answer({"result": [passages[:1]]})).url), ["q"], 3, timeout_s=20.0)
    assert (none.status, none.documents) == ("empty", [])


def test_parallel_map_raises_the_error_and_stops():
    done = []

    def work(n):
        if n == 1:
            raise KeyError(n)
        done.append(n)
        return n

    with pytest.raises(KeyError):
        parallel_map(work, range(1000), 2)
    assert len(done) < 1000
    assert parallel_map(work, [5, 4, 3], 2) == [5, 4, 3]
    assert parallel_map(work, [], 2) == []
