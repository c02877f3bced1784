"""Web search against a fake provider on loopback: schemas, budget, rate, key, replay."""

from __future__ import annotations

import urllib.parse

import pytest

from hiexp.agent.http_rules import ServiceError
from hiexp.agent.recorded_tool import RecordedTool
from hiexp.agent.tools import Document, call_tool
from hiexp.agent.web_tool import BudgetError, WebTool
from hiexp.rl.config import ToolConfig
from hiexp.rl.setup import make_tool

KEY = "s3cret-key"
PAGES = [
    {"title": "One", "link": "http://a/1", "snippet": "first <b>page</b>", "position": 1},
    {"title": "Two", "link": "http://a/2", "snippet": "second"},
    {"title": "One again", "link": "http://a/1", "snippet": "the same page"},
    {"title": "", "link": "http://a/3"},
    {"title": "Four", "link": "http://a/4", "snippet": "fourth", "sitelinks": []},
]
DOCUMENTS = [
    Document("http://a/1", "One", "first <b>page</b>"),
    Document("http://a/2", "Two", "second"),
    Document("http://a/4", "Four", "fourth"),
]


@pytest.fixture
def provider(http_server, monkeypatch):
    """Both providers; ``reply`` replaces the good answer. ``asked``: what came, read."""
    monkeypatch.setenv("SERPER_API_KEY", KEY)

    def answer(request):
        path, _, query = request.path.partition("?")
        if request.method == "POST":
            body = request.json()
            good = {"searchParameters": body, "organic": PAGES}
        else:
            body = dict(urllib.parse.parse_qsl(query))
            results = [{"title": p["title"], "url": p["link"], "content": p.get("snippet", "")} for p in PAGES]
            good = {"query": "q", "number_of_results": 5, "results": results}
        server.asked.append((request.method, path, body, request.headers.get("x-api-key")))
        return server.reply or (200, good)

    server = http_server(answer)
    server.asked, server.reply = [], None
    return server


def tool(provider, name="serper", **options):
    return WebTool(name, f"{provider.url}/search", **{"calls_per_second": 1e6, "retries": 0, **options})


def test_serper(provider):
    web = tool(provider)
    assert web.search(["größe?"], 5) == [DOCUMENTS]
    assert web.search(["q"], 1) == [DOCUMENTS[:1]]
    assert provider.asked[0] == ("POST", "/search", {"q": "größe?", "num": 5}, KEY)
    assert (web.calls, web.empty_passages, web.remote) == (2, 2, True)


def test_searxng_needs_no_key(provider, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY")
    assert tool(provider, "searxng").search(["a & b=c", "\ud800"], 2) == [DOCUMENTS[:2]] * 2
    assert ("GET", "/search", {"q": "a & b=c", "format": "json"}, None) in provider.asked


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {"message": "no"}), ["organic", "message"]),
        ((200, []), ["organic", "list"]),
        ((200, {"organic": {"title": "x"}}), ["organic"]),
        ((200, {"organic": [{"title": "no link"}]}), ["link", "no link"]),
        ((200, {"organic": [{"title": 3, "link": "http://a"}]}), ["title"]),
        ((200, {"organic": ["page"]}), ["results", "page"]),
        ((403, {"message": f"Unauthorized {KEY}"}), ["status 403", "Unauthorized ***"]),
        ((429, {"message": "slow down"}), ["1 attempts", "status 429"]),
    ],
)
def test_faults_are_recorded_without_the_key(provider, reply, words):
    provider.reply = reply
    (result,) = call_tool(tool(provider), ["q"], 3, timeout_s=20.0)
    assert result.status == "error"
    for word in words:
        assert word in result.error
    assert KEY not in result.error


def test_no_results_are_an_empty_search(provider):
    provider.reply = (200, {"organic": []})
    assert call_tool(tool(provider), ["q"], 3, timeout_s=20.0)[0].status == "empty"


def test_the_budget_counts_every_attempt(provider):
    web = tool(provider, max_calls=3, connections=1)
    web.search(["a", "b"], 1)
    provider.reply = (500, {})
    web.client.retries = 5
    with pytest.raises(BudgetError, match=r"all 3 calls \(tool.max_calls\) are spent"):
        web.search(["c"], 1)
    assert len(provider.asked) == web.calls == 3


def test_requests_are_spaced(provider, monkeypatch):
    clock = [100.0]
    pauses = []

    def sleep(seconds):
        pauses.append(round(seconds, 6))
        clock[0] += seconds

    monkeypatch.setattr("hiexp.agent.web_tool.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("hiexp.agent.web_tool.time.sleep", sleep)
    web = tool(provider, calls_per_second=4.0, connections=1)
    web.search(["a", "b", "c"], 1)
    assert pauses == [0.25, 0.25]
    clock[0] += 10.0
    web.search(["d"], 1)
    assert pauses == [0.25, 0.25]


def test_settings_are_checked_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable 'SERPER_API_KEY'"):
        WebTool("serper")
    monkeypatch.setenv("OTHER", "bad\nkey")
    with pytest.raises(ValueError, match="environment variable 'OTHER'") as caught:
        WebTool("serper", key_env="OTHER")
    assert "bad" not in str(caught.value)
    with pytest.raises(ValueError, match="provider: expected one of serper, searxng; got 'bing'"):
        WebTool("bing")
    with pytest.raises(ValueError, match="url: expected http://HOST:PORT/"):
        WebTool("searxng")
    with pytest.raises(ValueError, match="max_calls, calls_per_second"):
        WebTool("searxng", "http://h/search", max_calls=0)


def test_a_recorded_search_is_replayed_without_key_or_network(provider, monkeypatch, tmp_path):
    settings = {"kind": "web", "url": provider.url, "record": str(tmp_path / "web.sqlite"), "calls_per_second": 1e6}
    live = make_tool(ToolConfig(**settings))
    assert live.remote
    first = live.search(["q", "r"], 3)
    assert live.search(["q", "r"], 3) == first
    assert len(provider.asked) == 2
    assert KEY.encode() not in (tmp_path / "web.sqlite").read_bytes()
    monkeypatch.delenv("SERPER_API_KEY")
    replay = RecordedTool(tmp_path / "web.sqlite")
    assert replay.search(["r", "q"], 3) == [first[1], first[0]]
    assert not replay.remote
    provider.reply = (200, {"organic": "broken"})
    with pytest.raises(LookupError):
        replay.search(["new"], 3)
    with pytest.raises(ServiceError):
        live.search(["new"], 3)
