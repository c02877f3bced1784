"""The JSON client against a loopback server that misbehaves, byte by byte."""

from __future__ import annotations

import socket
import threading
from email.utils import formatdate

import pytest

from hiexp.agent import http_pool, http_rules
from hiexp.agent.http_json import JsonClient, post_json
from hiexp.agent.http_pool import parallel_map
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.http_tool import HttpTool
from hiexp.agent.tools import call_tool


def client(server, **options):
    return JsonClient(f"{server.url}/retrieve", **{"timeout_s": 5.0, "retries": 2, "connections": 4, **options})


def breaks_off(request):
    request.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")


def says_nothing(request):
    request.connection.shutdown(socket.SHUT_RDWR)


def test_one_connection_serves_many_requests(http_server):
    server = http_server((200, {"ok": 1}))
    one = client(server)
    assert [one.post({"n": n}) for n in range(20)] == [{"ok": 1}] * 20
    assert server.connections == 1
    assert [request.json()["n"] for request in server.requests] == list(range(20))
    assert (one.requests, one.retried) == (20, 0)
    one.close()
    one.post({})
    assert server.connections == 2


def test_a_connection_that_the_server_closed_is_replaced_at_once(http_server):
    server = http_server((200, {"ok": 1}), says_nothing, (200, {"ok": 2}))
    one = client(server, retries=0)
    assert one.post({}) == {"ok": 1}
    assert one.post({}) == {"ok": 2}
    assert server.pauses == []


def test_requests_run_at_once_but_no_more_than_allowed(http_server):
    """Replies come when three requests have arrived: with fewer at once this would never end."""
    together = threading.Barrier(3, timeout=20)
    under_way, most, lock = [0], [0], threading.Lock()

    def gather(request):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait()
        with lock:
            under_way[0] -= 1
        return 200, {"ok": 1}, {"Connection": "close"}

    one = client(http_server(gather), connections=3)
    assert parallel_map(lambda n: one.post({"n": n}), range(12), 6) == [{"ok": 1}] * 12
    assert most == [3]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (says_nothing, ["3 attempts"]),
        (breaks_off, ["3 attempts", "IncompleteRead"]),
        (b"not http at all\r\n\r\n", ["3 attempts", "BadStatusLine"]),
        ((500, b"busy"), ["3 attempts", "status 500", "busy"]),
        ((504, b""), ["3 attempts", "status 504"]),
        ((200, b'{"result": [['), ["3 attempts", "not valid JSON", "result"]),
        ((200, b"[" * 100_000), ["3 attempts", "not valid JSON"]),
    ],
)
def test_passing_faults_are_tried_again_then_named(http_server, fault, words):
    server = http_server(fault)
    with pytest.raises(ServiceError) as caught:
        client(server).post({})
    for word in [server.url, *words]:
        assert word in str(caught.value)
    assert server.pauses == [0.2, 0.4]
    recovering = http_server(fault, fault, (200, {"ok": 1}))
    assert client(recovering).post({}) == {"ok": 1}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((200, b"\xff\xfe"), ["expected JSON"]),
        ((401, b"who?"), ["status 401", "who?"]),
        ((301, b"", {"Location": "http://elsewhere/"}), ["status 301"]),
    ],
)
def test_lasting_faults_are_named_at_once(http_server, fault, words):
    server = http_server(fault)
    with pytest.raises(ServiceError) as caught:
        client(server).post({})
    for word in [server.url, *words]:
        assert word in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "start", [None, b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
)
def test_a_server_that_hangs_or_drips_is_left_after_the_time_limit(http_server, start):
    """Without a byte, and with one every 20 ms in the status line, in a header and in the body."""
    gone = threading.Event()

    def drips(request):
        while start is None and not server.release.wait(0.02):
            pass
        try:
            request.connection.sendall(start or b"")
            while not server.release.wait(0.02):
                request.connection.sendall(b"1")
        except OSError:
            gone.set()

    server = http_server(drips)
    with pytest.raises(ServiceError, match=r"last TimeoutError: no complete answer in 0.2 s"):
        client(server, timeout_s=0.2, retries=0).post({})
    assert start is None or gone.wait(20), "the client left while the answer still came"


def test_an_endless_answer_is_left(http_server, monkeypatch):
    monkeypatch.setattr(http_pool, "_MAX_REPLY_BYTES", 1000)
    with pytest.raises(ServiceError, match="more than 1000 bytes"):
        client(http_server((200, b" " * 5000)), retries=0).post({})


def test_retry_after_is_obeyed_as_seconds_and_as_a_date(http_server, monkeypatch):
    monkeypatch.setattr(http_rules.time, "time", lambda: 1_000_000_000.0)
    date = formatdate(1_000_000_007, usegmt=True)
    replies = [(429, b"", {"Retry-After": value}) for value in ("3", date, "900", "soon")]
    server = http_server(*replies, (200, {"ok": 1}))
    assert client(server, retries=4).post({}) == {"ok": 1}
    assert server.pauses == [3.0, 7.0, 20.0, 1.6]


def test_secrets_never_come_back_in_messages(http_server):
    server = http_server((403, b"the key sk-secret is wrong"))
    with pytest.raises(ServiceError) as caught:
        client(server, headers={"X-API-KEY": "sk-secret"}).post({})
    assert server.requests[0].headers["x-api-key"] == "sk-secret"
    assert "sk-secret" not in str(caught.value)
    assert "the key *** is wrong" in str(caught.value)


def test_large_batches_are_split_and_keep_their_order(http_server):
    def echo(request):
        return 200, {"result": [[{"id": q, "contents": f"t\n{q}"}] for q in request.json()["queries"]]}

    server = http_server(echo)
    tool = HttpTool(f"{server.url}/retrieve", connections=1)
    queries = [f"q{i}" for i in range(150)]
    assert [one.text for (one,) in tool.search(queries, 1)] == queries
    assert [len(request.json()["queries"]) for request in server.requests] == [64, 64, 22]
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


def test_unicode_of_every_kind_goes_there_and_comes_back(http_server):
    passages = [[{"id": i, "contents": f"T\n{text}"}] for i, text in enumerate(UNICODE)]
    server = http_server((200, {"result": passages}))
    tool = HttpTool(f"{server.url}/retrieve")
    results = call_tool(tool, UNICODE, 3, timeout_s=20.0)
    assert server.requests[0].json()["queries"] == UNICODE
    assert [one.status for one in results] == ["ok"] * len(UNICODE)
    for result in results:
        result.documents[0].text.encode("utf-8")  # what a tokenizer will do
    assert results[1].documents[0].text == UNICODE[1]


def test_empty_passages_are_left_out_and_counted(http_server):
    passages = [{"id": 1, "contents": "\n"}, {"id": 2, "contents": "T\ntext"}, {"id": 3, "contents": "\u200b\x00 "}]
    tool = HttpTool(http_server((200, {"result": [passages]})).url + "/retrieve")
    (result,) = call_tool(tool, ["q"], 3, timeout_s=20.0)
    assert [document.id for document in result.documents] == ["2"]
    assert tool.empty_passages == 2
    (none,) = call_tool(
        HttpTool(http_server((200, {"result": [passages[:1]]})).url + "/retrieve"), ["q"], 3, timeout_s=20.0
    )
    assert (none.status, none.documents) == ("empty", [])


def test_many_clients_at_once_pause_at_random(http_server):
    server = http_server((503, b""), (503, b""), (200, {"ok": 1}))
    assert post_json(server.url, {}, timeout_s=5.0, retries=2) == {"ok": 1}
    first, second = server.pauses
    assert 0.1 <= first <= 0.2 <= second <= 0.4
    assert (first, second) != (0.2, 0.4)


def test_headers_that_cannot_be_sent_are_refused_without_their_value():
    with pytest.raises(ValueError, match="expected printable ASCII as Authorization") as caught:
        post_json("http://127.0.0.1:1", {}, timeout_s=1.0, retries=0, headers={"Authorization": "Bearer sk-1\n"})
    assert "sk-1" not in str(caught.value)
