"""Secrets in messages: what is blotted, what stays."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.agent.http_json import JsonClient, post_json
from hiexp.agent.http_rules import ServiceError, blot, check_url, shown, start_of


@given(st.text(), st.text(), st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1), st.text("xyz-", min_size=1))
def test_no_secret_is_left_wherever_it_stands(before, after, secret, longer):
    """In either order, one key being the start of the other."""
    for words in ([secret, secret + longer], [secret + longer, secret]):
        assert secret not in blot(f"{before}{secret}{longer} {secret}{after}", words)
        assert blot(f"<{secret}{longer}>", words) == "<***>"


def test_keys_of_the_environment_are_blotted(monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "db_password", "TOKEN"):
        monkeypatch.setenv(name, "hush-12345")
        assert blot("said hush-12345.") == "said ***."
        monkeypatch.delenv(name)
    monkeypatch.setenv("MY_KEY", "key")  # a word, not a key
    monkeypatch.setenv("KEYBOARD", "qwertyuiop")
    assert blot("the key qwertyuiop") == "the key qwertyuiop"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://ann:pw@h:80/v1: no", "http://***@h:80/v1: no"),
        ("https://token@h/", "https://***@h/"),
        ("http://h/a?api_key=12&q=x", "http://h/a?api_key=***&q=x"),
        ("'http://h?q=x&token=1#f'", "'http://h?q=x&token=***#f'"),
        ("http://h/a@b?monkey=1", "http://h/a@b?monkey=***"),  # too much rather than too little
        ("mail ann@h, see http://h/", "mail ann@h, see http://h/"),
    ],
)
def test_credentials_of_urls_are_blotted(text, left):
    assert blot(text) == left
    assert str(ServiceError(text)) == left
    assert str(pickle.loads(pickle.dumps(ServiceError(text)))) == left


def test_half_a_key_at_the_end_is_a_secret_too():
    for shift in range(190, 202):
        assert "hu" not in start_of(b"-" * shift + b"hush-12345", ["hush-12345"])
        assert "hu" not in shown(["-" * shift + "hush-12345"], ["hush-12345"])


def test_bad_urls_are_named_without_their_password():
    with pytest.raises(ValueError, match=r"url: expected http://HOST:PORT/…, got 'ftp://\*\*\*@h'"):
        check_url("url", "ftp://ann:pw@h")


def test_both_clients_hide_what_a_server_repeats(http_server, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "from-the-environment")
    server = http_server((403, b"sk-given and from-the-environment"))
    url = server.url.replace("//", "//ann:pw@")
    headers = {"Authorization": "Bearer sk-given"}
    client = JsonClient(url, timeout_s=5.0, retries=0, connections=1, headers=headers)
    for ask in (client.post, lambda body: post_json(url, body, timeout_s=5.0, retries=0, headers=headers)):
        with pytest.raises(ServiceError) as caught:
            ask({})
        assert str(caught.value) == f"{server.url.replace('//', '//***@')}: status 403: '*** and ***'"
    assert server.requests[-1].headers["authorization"] == "Bearer sk-given"
