"""The engine against the model itself: what it sampled, rescored from scratch, must have the same log-probabilities."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hiexp.agent.engine import Sampling, generate  # noqa: E402
from hiexp.agent.engine_transformers import TransformersEngine  # noqa: E402

NAMES = ["llama", "qwen2", "mistral", "qwen2-windowed", "tiny"]
STOP = ("</tool_call>", "\\boxed{}")
# Rows stop at different steps and go on: while they wait they get holes in the middle.
OFTEN = tuple(f"w{i}" for i in range(0, 40, 6))


def prompts_of(count, vocabulary, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocabulary, size=int(rng.integers(1, longest))).tolist() for _ in range(count)]


def rescored(model, tokens, temperature=1.0):
    """Log-probability of every token given those before it, in one pass without cache or padding."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0, :-1]
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return [0.0, *logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()]


def play(engine, prompts, seeds, turns=3, limit=12, sampling=Sampling()):  # noqa: B008
    """Several turns with ragged insertions in between; rows leave at random. Returns the session and (start, said)."""
    session = engine.open(prompts, seeds)
    sampled = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for turn in range(turns):
        starts = [len(session.tokens[row]) for row in rows]
        limits = [limit + (seeds[row] * 7 + turn * 3) % 5 for row in rows]
        for row, start, said in zip(rows, starts, generate(session, rows, limits, OFTEN, sampling), strict=True):
            sampled[row].append((start, said))
        rows = [row for row in rows if (seeds[row] + turn) % 4 and sampled[row][-1][1].finish_reason == "stop"]
        session.extend(rows, [[5 + (seeds[row] + i) % 20 for i in range(1 + seeds[row] % 5)] for row in rows])
    return session, sampled


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in NAMES), ("llama", 0.7)])
def test_turns_with_holes_equal_rescoring_from_scratch(tiny_models, fast_tokenizer, name, temperature):
    engine = TransformersEngine(tiny_models[name], fast_tokenizer)
    prompts = prompts_of(40, len(fast_tokenizer))
    session, sampled = play(engine, prompts, list(range(40)), sampling=Sampling(temperature=temperature))
    tokens = session.tokens
    assert sum(len(turns) == 3 for turns in sampled) > 3
    for row, turns in enumerate(sampled):
        truth = rescored(tiny_models[name], tokens[row], temperature)
        for start, said in turns:
            assert tokens[row][start : start + len(said.token_ids)] == said.token_ids
            np.testing.assert_allclose(said.logprobs, truth[start : start + len(said.token_ids)], atol=2e-5)


@pytest.mark.parametrize(("name", "top_p"), [("llama", 1.0), ("qwen2", 0.8), ("mistral", 1.0), ("tiny", 0.8)])
def test_samples_do_not_depend_on_the_batch(tiny_models, fast_tokenizer, name, top_p):
    engine = TransformersEngine(tiny_models[name], fast_tokenizer)
    prompts, seeds = prompts_of(10, len(fast_tokenizer)), list(range(40, 50))
    sampling = Sampling(top_p=top_p)
    together = play(engine, prompts, seeds, sampling=sampling)[0].tokens
    for row in range(10):
        assert play(engine, [prompts[row]], [seeds[row]], sampling=sampling)[0].tokens == [together[row]]
    backwards = play(engine, prompts[::-1], seeds[::-1], sampling=sampling)[0].tokens
    assert backwards[::-1] == together


def test_seed_decides_the_sample(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer)
    said = generate(engine.open([[7, 8, 9]] * 30, list(range(30))), range(30), [6] * 30, (), Sampling())
    assert len({tuple(generation.token_ids) for generation in said}) > 15


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_greedy_equals_generate_of_transformers(tiny_models, fast_tokenizer, name):
    model = tiny_models[name]
    prompts = prompts_of(6, len(fast_tokenizer), seed=1)
    engine = TransformersEngine(model, fast_tokenizer)
    said = generate(engine.open(prompts, [0] * 6), range(6), [20] * 6, (), Sampling(temperature=0.0))
    for prompt, generation in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert generation.token_ids == want[0, len(prompt) :].tolist()


def test_rows_that_left_the_batch_can_come_back(tiny_models, fast_tokenizer):
    """A row that ended by length, or was skipped for a turn, is rebuilt when it is addressed again."""
    engine = TransformersEngine(tiny_models["tiny"], fast_tokenizer)
    prompts = prompts_of(4, len(fast_tokenizer))
    session = engine.open(prompts, [1, 2, 3, 4])
    for rows in ([0, 1, 2, 3], [1], [3, 0], [0, 1, 2, 3]):
        generate(session, rows, [3] * len(rows), (), Sampling())
    other = engine.open(prompts, [1, 2, 3, 4])
    for row, turns in enumerate((3, 3, 2, 3)):
        for _ in range(turns):
            generate(other, [row], [3], (), Sampling())
    assert session.tokens == other.tokens


def flow(engine, prompts, seeds, in_flight, turns=3, limit=12):
    """As :func:`play`, but every row goes on as soon as its turn ended, ``in_flight`` rows at a time."""
    session = engine.open(prompts, seeds)
    sampled, waiting, flying = [[] for _ in prompts], list(range(len(prompts))), set()
    starts = {}
    while waiting or flying:
        new = waiting[: in_flight - len(flying)]
        waiting = waiting[len(new) :]
        flying |= set(new)
        for row, said in [] if new else session.finished(block=len(flying) % 2 == 0):
            sampled[row].append((starts[row], said))
            turn = len(sampled[row])
            goes_on = (seeds[row] + turn - 1) % 4 and said.finish_reason == "stop"
            if goes_on:
                session.extend([row], [[5 + (seeds[row] + i) % 20 for i in range(1 + seeds[row] % 5)]])
            if goes_on and turn < turns:
                new.append(row)
            else:
                flying.discard(row)
                session.release([row])
        starts |= {row: len(session.tokens[row]) for row in new}
        limits = [limit + (seeds[row] * 7 + len(sampled[row]) * 3) % 5 for row in new]
        session.start(new, limits, OFTEN, Sampling())
    return session, sampled


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_come_and_go_equal_lock_step_and_rescoring(tiny_models, fast_tokenizer, name):
    engine = TransformersEngine(tiny_models[name], fast_tokenizer)
    prompts, seeds = prompts_of(24, len(fast_tokenizer)), list(range(24))
    together = play(engine, prompts, seeds)[0].tokens
    session, sampled = flow(engine, prompts, seeds, in_flight=7)
    assert session.tokens == together
    for row, turns in enumerate(sampled):
        truth = rescored(tiny_models[name], session.tokens[row])
        for start, said in turns:
            np.testing.assert_allclose(said.logprobs, truth[start : start + len(said.token_ids)], atol=2e-5)
    assert session._batch is None  # nothing is kept of rows that were released
    assert all(row.stored is None for row in session._rows)


def test_a_session_goes_on_where_another_one_died(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer)
    prompts, seeds = prompts_of(6, len(fast_tokenizer)), list(range(6))
    whole, first = engine.open(prompts, seeds), engine.open(prompts, seeds)
    for session, count in ((whole, 2), (first, 1)):
        for _ in range(count):
            generate(session, range(6), [7] * 6, (), Sampling())
    counts = [len(tokens) - len(prompt) for tokens, prompt in zip(first.tokens, prompts, strict=True)]
    second = engine.open(first.tokens, seeds, counts)
    generate(second, range(6), [7] * 6, (), Sampling())
    assert second.tokens == whole.tokens
    with pytest.raises(ValueError, match="drawn: expected one per prompt"):
        engine.open(prompts, seeds, [0])


def test_released_rows_stop_and_cannot_start_again(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer)
    alone = engine.open([[7, 8]], [1])
    session = engine.open([[5, 6], [7, 8], [9]], [0, 1, 2])
    want = generate(alone, [0], [20], (), Sampling())[0]
    session.start([0, 1, 2], [20, 20, 20], (), Sampling())
    assert session.finished(block=False) == []
    session.release([0, 2])
    ((row, said),) = session.finished()
    assert (row, said.token_ids) == (1, want.token_ids)
    assert len(session.tokens[0]) < 22
    assert session.finished() == []
    with pytest.raises(ValueError, match="expected idle rows of 0 to 2, got 0"):
        session.start([0], [5], (), Sampling())
    session.start([1], [2], (), Sampling())
    with pytest.raises(ValueError, match="idle rows"):
        session.start([1], [2], (), Sampling())


def test_equal_prompts_are_prefilled_once(tiny_models, fast_tokenizer, monkeypatch):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer)
    fed, forward = [], engine.forward
    monkeypatch.setattr(engine, "forward", lambda ids, *rest: fed.append(tuple(ids.shape)) or forward(ids, *rest))
    prompts = [[5, 6, 7, 8]] * 8 + [[9, 10, 11, 12]] * 8
    session = engine.open(prompts, range(16))
    session.start(range(16), [6] * 16, (), Sampling())
    session.finished(block=False)
    assert fed[-1] == (2, 4)
    session.finished()
    for row in (0, 9):
        single = engine.open([prompts[row]], [row])
        generate(single, [0], [6], (), Sampling())
        assert single.tokens[0] == session.tokens[row]


def test_kinds_of_sampling_can_be_mixed(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["qwen2"], fast_tokenizer)
    kinds = [Sampling(), Sampling(temperature=0.0), Sampling(0.7, 0.8)]
    session = engine.open([[5, 6, 7]] * 6, range(6))
    for row in range(6):
        session.start([row], [9], (), kinds[row % 3])
    done = {}
    while len(done) < 6:
        done.update(session.finished())
    for row in range(6):
        said = generate(engine.open([[5, 6, 7]], [row]), [0], [9], (), kinds[row % 3])[0]
        assert done[row].token_ids == said.token_ids
        np.testing.assert_allclose(done[row].logprobs, said.logprobs, atol=2e-5)


def test_prefill_in_chunks_changes_nothing(tiny_models, fast_tokenizer, monkeypatch):
    prompts = prompts_of(5, len(fast_tokenizer), longest=40)
    for name in ("llama", "tiny"):
        engine = TransformersEngine(tiny_models[name], fast_tokenizer)
        whole = play(engine, prompts, [1, 2, 3, 5, 6])[0].tokens
        monkeypatch.setattr("hiexp.agent.decoding._PREFILL_TOKENS", 15)
        assert play(engine, prompts, [1, 2, 3, 5, 6])[0].tokens == whole
        monkeypatch.undo()


def test_finish_reasons_and_limits(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer, context_length=30)
    prompts = prompts_of(64, len(fast_tokenizer), seed=3)
    limits = [i % 12 for i in range(64)]
    said = generate(engine.open(prompts, list(range(64))), range(64), limits, STOP, Sampling(temperature=1.5))
    seen = set()
    for prompt, limit, generation in zip(prompts, limits, said, strict=True):
        count = len(generation.token_ids)
        seen.add(generation.finish_reason)
        assert count == len(generation.logprobs) <= min(limit, 30 - len(prompt))
        text = fast_tokenizer.decode(generation.token_ids)
        ended = {"eos": 3 in generation.token_ids, "stop": "</tool_call>" in text or "}" in text}
        if generation.finish_reason == "length":
            assert count == limit
        else:
            assert ended[generation.finish_reason]
        assert 3 not in generation.token_ids[:-1]
        assert "</tool_call>" not in fast_tokenizer.decode(generation.token_ids[:-1]).split()
    assert seen == {"eos", "stop", "length"}


def test_context_ends_a_row(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer, context_length=8)
    session = engine.open([[5, 6, 7], [5] * 8], [0, 1])
    first, full = generate(session, [0, 1], [50, 50], (), Sampling(temperature=0.0))
    if first.finish_reason == "context":
        assert len(session.tokens[0]) == 8
    assert (full.token_ids, full.finish_reason) == ([], "context")
    with pytest.raises(ValueError, match="row 1 would have 9 tokens, the context is 8"):
        session.extend([1], [[5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.open([[]], [0]), r"prompts\[0\]: expected 1 to 128 tokens .context., got 0"),
        (lambda engine: engine.open([[5] * 129], [0]), r"prompts\[0\]: expected 1 to 128 tokens .context., got 129"),
        (lambda engine: engine.open([[5]], []), "seeds: expected one per prompt"),
        (lambda engine: generate(engine.open([[5]], [0]), [0, 0], [1, 1], (), Sampling()), "distinct rows"),
        (
            lambda engine: TransformersEngine(engine.model, None, context_length=500),
            "context_length: expected 1 to 128",
        ),
    ],
)
def test_wrong_arguments_are_named(tiny_models, fast_tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(TransformersEngine(tiny_models["llama"], fast_tokenizer))


def test_model_without_head_is_refused(tiny_models, fast_tokenizer):
    with pytest.raises(ValueError, match="causal language model with a head, got LlamaModel"):
        TransformersEngine(tiny_models["llama"].model, fast_tokenizer)


def test_diverged_weights_give_an_error_not_garbage(tiny_models, fast_tokenizer):
    import copy

    model = copy.deepcopy(tiny_models["llama"])
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(TransformersEngine(model, fast_tokenizer).open([[5, 6]], [0]), [0], [4], (), Sampling())


def test_training_mode_and_gradients_are_left_alone(tiny_models, fast_tokenizer):
    model = tiny_models["llama"].train()
    try:
        session = TransformersEngine(model, fast_tokenizer).open([[5, 6]], [0])
        generate(session, [0], [4], (), Sampling())
        assert model.training
        assert model(input_ids=torch.tensor([[5, 6]])).logits.requires_grad
    finally:
        model.eval()


def test_the_cache_of_a_session_goes_with_it(tiny_models, fast_tokenizer):
    engine = TransformersEngine(tiny_models["llama"], fast_tokenizer)
    session = engine.open(prompts_of(2, len(fast_tokenizer)), [1, 2])
    session.start([0, 1], [6, 6], [], Sampling())
    session.finished(block=False)
    assert engine.clock.take().keys() == {"seconds_prefill"}
    session.finished(block=False)
    assert engine.clock.take().keys() == {"seconds_decode"}
    buffers = [weakref.ref(buffer) for buffer in session._batch._buffers]
    gc.disable()  # a cycle would wait for the collector, and hold its memory through the update
    try:
        del session
        assert [buffer() for buffer in buffers] == [None] * len(buffers)
    finally:
        gc.enable()
