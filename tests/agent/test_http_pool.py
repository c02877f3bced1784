"""Connections: proxies and targets; functions in parallel."""

from __future__ import annotations

import base64

import pytest

from hiexp.agent.http_json import JsonClient
from hiexp.agent.http_pool import parallel_map


def test_a_proxy_gets_its_credentials_and_the_server_those_of_nobody(http_server, monkeypatch):
    proxy = http_server((200, {"ok": 1}))
    monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//ann:p%40ss@"))
    monkeypatch.setenv("no_proxy", "")
    client = JsonClient("http://bob:secret@search.example:81/a?v=1", timeout_s=5.0, retries=0, connections=1)
    assert client.get({"q": "x y"}) == {"ok": 1}
    (request,) = proxy.requests
    assert request.path == "http://search.example:81/a?v=1&q=x+y"
    kind, _, value = request.headers["proxy-authorization"].partition(" ")
    assert (kind, base64.b64decode(value)) == ("Basic", b"ann:p@ss")


def test_a_url_keeps_its_own_query(http_server):
    server = http_server((200, {"ok": 1}))
    client = JsonClient(f"{server.url}/a?v=1", timeout_s=5.0, retries=0, connections=1)
    client.post({})
    client.get({"q": "x"})
    assert [request.path for request in server.requests] == ["/a?v=1", "/a?v=1&q=x"]
    assert "proxy-authorization" not in server.requests[0].headers


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
