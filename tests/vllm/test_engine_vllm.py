"""Turns of vLLM are those of the transformers engine over the same weights."""

from __future__ import annotations

from copy import deepcopy

import pytest

from hiexp.agent.engine import EngineError, Sampling, generate

PROMPTS = [[1, 5, 9, 200, 33], [1, 40], [1, *range(100, 170)], [7, 7, 7, 250]]
SEEDS = [11, 12, 13, 14]
ROWS = range(4)


def turns(engine, sampling, limits=(20, 12, 30, 1), stop=(), prompts=PROMPTS, drawn=None):
    session = engine.open(prompts, SEEDS[: len(prompts)], drawn)
    return generate(session, range(len(prompts)), limits[: len(prompts)], stop, sampling)


def assert_same(mine, theirs, tolerance=2e-4):
    assert [g.token_ids for g in mine] == [g.token_ids for g in theirs]
    assert [g.finish_reason for g in mine] == [g.finish_reason for g in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.0, 0.8), Sampling(0.6, 0.9)], ids=str)
def test_turns_equal_those_of_transformers(vllm_engine, local, sampling):
    ours = turns(vllm_engine, sampling)
    assert_same(ours, turns(local, sampling))
    assert all(len(set(g.token_ids)) > 3 for g in ours[:3])  # not one token over and over


def test_rows_with_other_settings_share_a_batch(vllm_engine, local):
    sessions = [vllm_engine.open([prompt], [seed]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    settings = [Sampling(0.0), Sampling(1.0, 0.7), Sampling(0.5), Sampling(1.3, 0.9)]
    for session, sampling in zip(sessions, settings, strict=True):
        session.start([0], [9], [], sampling)
    for session, prompt, seed, sampling in zip(sessions, PROMPTS, SEEDS, settings, strict=True):
        ((_, turn),) = session.finished()
        assert_same([turn], generate(local.open([prompt], [seed]), [0], [9], [], sampling))


def test_stop_strings_end_the_turn_at_the_same_token(vllm_engine, local, tokenizer):
    free = turns(local, Sampling(0.0))
    pieces = [tokenizer.decode(free[0].token_ids[6:8]), tokenizer.decode(free[2].token_ids[4:6])]
    ours = turns(vllm_engine, Sampling(0.0), stop=pieces)
    assert_same(ours, turns(local, Sampling(0.0), stop=pieces))
    assert ours[0].finish_reason == ours[2].finish_reason == "stop"
    assert len(ours[0].token_ids) <= 8
    assert ours[3].finish_reason == "length"


def test_end_of_sequence(vllm_engine, local, tokenizer, monkeypatch):
    free = turns(local, Sampling(0.0))
    other = deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(free[0].token_ids[5])
    for engine in (vllm_engine, local):
        monkeypatch.setattr(engine, "tokenizer", other)
        monkeypatch.setattr(engine, "_rules", {})
    ours = turns(vllm_engine, Sampling(0.0))
    assert_same(ours, turns(local, Sampling(0.0)))
    assert ours[0].finish_reason == "eos"
    assert len(ours[0].token_ids) <= 6


def test_context_ends_a_row(vllm_engine, local):
    length = vllm_engine.context_length
    prompts = [[5] * (length - 3), [5] * length]
    ours = turns(vllm_engine, Sampling(1.0), limits=(10, 10), prompts=prompts)
    assert_same(ours, turns(local, Sampling(1.0), limits=(10, 10), prompts=prompts))
    assert [(len(g.token_ids), g.finish_reason) for g in ours] == [(3, "context"), (0, "context")]


def test_later_turns_continue_the_row_and_find_its_prefix_cached(vllm_engine, local):
    results = []
    for engine in (vllm_engine, local):
        session = engine.open(PROMPTS[2:3], [5])
        first = generate(session, [0], [40], [], Sampling(1.0))
        session.extend([0], [[17, 18, 19]])
        if engine is vllm_engine:
            before = engine.cached_tokens, engine.prompt_tokens
        results.append(first + generate(session, [0], [40], [], Sampling(1.0)))
    assert_same(*results)
    # 71 prompt tokens and 40 sampled ones lie in whole blocks of 32, three of them.
    assert vllm_engine.cached_tokens - before[0] >= 96
    assert vllm_engine.prompt_tokens - before[1] == 71 + 40 + 3


def test_a_row_goes_on_where_a_dead_engine_left_it(vllm_engine):
    whole = turns(vllm_engine, Sampling(1.0), limits=(20,), prompts=PROMPTS[:1])[0]
    start = PROMPTS[0] + whole.token_ids[:7]
    rest = turns(vllm_engine, Sampling(1.0), limits=(13,), prompts=[start], drawn=[7])[0]
    assert whole.token_ids[7:] == rest.token_ids


def test_release_ends_a_running_turn_and_leaves_the_others(vllm_engine, local):
    session = vllm_engine.open(PROMPTS, SEEDS)
    session.start(ROWS, [30] * 4, [], Sampling(1.0))
    assert session.finished(block=False) == []
    session.release([1, 3])
    done = {}
    while ended := session.finished():
        done.update(ended)
    assert sorted(done) == [0, 2]
    assert_same([done[0], done[2]], [turns(local, Sampling(1.0), limits=(30,) * 4)[i] for i in (0, 2)])
    assert session.finished() == []
    with pytest.raises(ValueError, match="idle rows"):
        session.start([1], [5], [], Sampling(1.0))


def test_a_failing_engine_is_an_engine_error(vllm_engine, make_model, monkeypatch):
    session = vllm_engine.open(PROMPTS[:1], [1])
    session.start([0], [5], [], Sampling(0.0))
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine._engine, "step", lambda: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            session.finished()
    # What was under way is given up; new sessions work, and new weights may come.
    assert turns(vllm_engine, Sampling(0.0))[0].finish_reason == "length"
    vllm_engine.load_weights(make_model(0).state_dict())


def test_a_folder_without_a_model_is_refused_by_name(tokenizer, tmp_path):
    from hiexp.agent.engine_vllm import VllmEngine

    with pytest.raises(EngineError, match=str(tmp_path)):
        VllmEngine(str(tmp_path), tokenizer)
