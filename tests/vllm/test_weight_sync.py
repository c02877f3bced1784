"""New weights reach the running vLLM, nothing of the old ones stays, and a failure to arrive is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from hiexp.agent.engine import Sampling, generate
from hiexp.rl.weight_sync import WeightSync, WeightSyncError, sequence_logprobs

PROMPT = [1, *range(60, 180)]  # three whole blocks of the cache and a part
PROBES = [PROMPT, [7, 8, 9, 200, 201], [1, 33] * 20]


def greedy(engine, prompt=PROMPT, count=24):
    session = engine.open([prompt], [0])
    (turn,) = generate(session, [0], [count], [], Sampling(0.0))
    session.release([0])
    return turn


@pytest.fixture
def other(make_model):
    return make_model(1)


@pytest.fixture
def other_local(other, tokenizer):
    from hiexp.agent.engine_transformers import TransformersEngine

    return TransformersEngine(other, tokenizer)


def test_greedy_turns_and_logprobs_follow_the_trainer(vllm_engine, local, other, other_local):
    sync = WeightSync(vllm_engine, PROBES, tolerance=1e-4)
    before = greedy(vllm_engine)
    assert before.token_ids == greedy(local).token_ids
    with pytest.raises(WeightSyncError, match="probe tokens are"):
        sync.check(sync.expected(other))

    vllm_engine.weights_changed = True
    assert sync.push(other.state_dict()) > 0
    gaps = sync.check(sync.expected(other))
    assert 0 <= gaps["sync_gap_mean"] <= gaps["sync_gap_max"] < 1e-3
    after = greedy(vllm_engine)
    assert after.token_ids == greedy(other_local).token_ids != before.token_ids
    assert after.logprobs == pytest.approx(greedy(other_local).logprobs, abs=2e-4)


def test_keys_and_values_of_the_old_policy_would_spoil_turns_of_the_new_one(
    vllm_engine, other, other_local, monkeypatch
):
    """The reset in load_weights is needed: without it the very same calls give something else."""
    vllm_engine.weights_changed = True
    expected = greedy(other_local)
    greedy(vllm_engine)  # caches the prompt under the old weights
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "reset_cache", lambda: None)
        vllm_engine.load_weights(other.state_dict())
        cached = vllm_engine.cached_tokens
        spoilt = greedy(vllm_engine)
        assert vllm_engine.cached_tokens > cached
    assert not np.allclose(spoilt.logprobs, expected.logprobs, atol=0.05)
    vllm_engine.load_weights(other.state_dict())
    assert greedy(vllm_engine).logprobs == pytest.approx(expected.logprobs, abs=2e-4)


def test_prompt_logprobs_are_those_of_transformers(vllm_engine, local):
    given = vllm_engine.prompt_logprobs(PROBES)
    for probe, values in zip(PROBES, given, strict=True):
        assert len(values) == len(probe) - 1
        assert values == pytest.approx(sequence_logprobs(local.model, probe), abs=2e-4)
    with pytest.raises(ValueError, match=r"sequences\[1\]: expected 2 to 255 tokens, got 1"):
        vllm_engine.prompt_logprobs([[1, 2], [1]])


def test_weights_are_not_changed_under_a_turn(vllm_engine, other):
    session = vllm_engine.open([PROMPT], [0])
    session.start([0], [5], [], Sampling(0.0))
    with pytest.raises(ValueError, match="no turn under way, got 1"):
        vllm_engine.load_weights(other.state_dict())
    session.release([0])
