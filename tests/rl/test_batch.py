"""Micro-batches: every trained token is predicted from the position before it, whatever the batching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.record import Rollout
from hiexp.rl.batch import microbatches, packed_engine_logprobs, sampled_positions, trainable
from hiexp.rl.distributed import Ranks


def make_rollout(tokens, mask, name="q/0/0"):
    logprobs = [-0.5 * t if m else 0.0 for t, m in enumerate(mask)]
    return Rollout(name, "q", "?", list(tokens), list(mask), logprobs, [], [], [], None, 0, 0, "hiexp", "answer", None)


rollout_strategy = st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=2, max_size=12).filter(
    lambda pairs: any(m for _, m in pairs[1:])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rollout_strategy, min_size=1, max_size=7), st.integers(1, 40))
def test_rows_point_before_their_targets_and_cover_each_token_once(pairs, budget):
    rollouts = [make_rollout([t for t, _ in row], [int(m) for _, m in row]) for row in pairs]
    seen = []
    for batch in microbatches(rollouts, range(len(rollouts)), budget, pad_id=0):
        rows, width = batch.input_ids.shape
        assert rows * width <= budget or rows == 1
        flat_ids, flat_real = batch.input_ids.reshape(-1), batch.attention_mask.reshape(-1)
        for b, i in enumerate(batch.indices):
            start, end = batch.cu_seqlens[b].item(), batch.cu_seqlens[b + 1].item()
            positions = sampled_positions(rollouts[i])
            assert batch.targets[start:end].tolist() == [rollouts[i].token_ids[t] for t in positions]
            assert batch.rows[start:end].tolist() == [b * width + t - 1 for t in positions]
            assert flat_ids[batch.rows[start:end]].tolist() == [rollouts[i].token_ids[t - 1] for t in positions]
            assert flat_real[batch.rows[start:end]].all()
            seen.append(i)
        expected = [rollouts[i].logprobs[t] for i in batch.indices for t in sampled_positions(rollouts[i])]
        assert packed_engine_logprobs(rollouts, batch).tolist() == pytest.approx(expected)
        assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
        assert torch.equal(batch.position_ids, torch.arange(width).expand(rows, width))
    assert sorted(seen) == list(range(len(rollouts)))


# Few different tokens, so that rollouts often begin alike.
alike_strategy = st.lists(st.tuples(st.integers(1, 2), st.booleans()), min_size=2, max_size=12).filter(
    lambda pairs: any(m for _, m in pairs[1:])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(alike_strategy, min_size=1, max_size=7), st.integers(1, 40))
def test_packed_rows_stand_behind_the_tokens_of_their_rollout(pairs, budget):
    rollouts = [make_rollout([t for t, _ in row], [int(m) for _, m in row]) for row in pairs]
    seen = []
    for batch in microbatches(rollouts, range(len(rollouts)), budget, pad_id=0, packed=True):
        lengths = [max(t for t in sampled_positions(rollouts[i])) for i in batch.indices]
        assert batch.input_ids.shape[1] <= (budget if len(lengths) > 1 else lengths[0])
        assert batch.attention_mask is None
        ids, positions = batch.input_ids[0], batch.position_ids[0]
        visible = visible_tokens(batch.layout)
        for b, i in enumerate(batch.indices):
            piece = slice(*batch.cu_seqlens[b : b + 2].tolist())
            trained = sampled_positions(rollouts[i])
            assert batch.targets[piece].tolist() == [rollouts[i].token_ids[t] for t in trained]
            assert positions[batch.rows[piece]].tolist() == [t - 1 for t in trained]
            for row, t in zip(batch.rows[piece].tolist(), trained, strict=True):
                context = sorted((positions[j].item(), ids[j].item()) for j in visible[row])
                assert context == list(enumerate(rollouts[i].token_ids[:t]))
            seen.append(i)
        expected = [rollouts[i].logprobs[t] for i in batch.indices for t in sampled_positions(rollouts[i])]
        assert packed_engine_logprobs(rollouts, batch).tolist() == pytest.approx(expected)
    assert sorted(seen) == list(range(len(rollouts)))


def visible_tokens(layout):
    """Row -> rows it sees."""
    visible = {}
    for part in [layout.own] + ([layout.cross] if layout.cross is not None else []):
        for queries, keys in part.segments():
            for row in range(queries.start, queries.stop):
                seen = visible.setdefault(row, [])
                seen += range(keys.start, row + 1 if part.causal else keys.stop)
    return visible


def test_packing_shares_the_prompt_of_each_group():
    prompts = [[1] * 20, [2] * 20, [1] * 10 + [3] * 10]
    rollouts = [make_rollout(prompts[i % 3] + [4 + i, 5, 6, 7], [0] * 20 + [1] * 4) for i in range(6)]
    (batch,) = microbatches(rollouts, range(6), 1000, pad_id=0, packed=True)
    # Prompts 1 and 3 have ten tokens in common; sharing those would cost each pair the other ten.
    assert batch.input_ids.shape[1] == 3 * 20 + 6 * 3
    assert {frozenset(pair) for pair in zip(batch.indices[::2], batch.indices[1::2], strict=True)} == {
        frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})
    }  # fmt: skip
    again = microbatches(rollouts, [5, 3, 1, 0, 2, 4], 1000, pad_id=0, packed=True)
    assert again[0].indices == batch.indices
    # A group beyond the budget is cut; each part then has the prompt for itself.
    rollouts = [make_rollout([1] * 20 + [2 + i, 9, 9, 9], [0] * 20 + [1] * 4) for i in range(4)]
    batches = microbatches(rollouts, range(4), 30, pad_id=0, packed=True)
    assert [batch.input_ids.shape[1] for batch in batches] == [20 + 3 * 3, 20 + 3]


def test_tokens_after_the_last_sampled_one_are_dropped():
    rollout = make_rollout([5, 6, 7, 8, 9], [0, 1, 0, 0, 0])
    (batch,) = microbatches([rollout], [0], 100, pad_id=0)
    assert batch.input_ids.tolist() == [[5]]
    assert batch.targets.tolist() == [6]


def test_similar_lengths_share_a_batch():
    rollouts = [make_rollout([1] * n, [0] + [1] * (n - 1)) for n in (3, 11, 4, 10)]
    assert [batch.indices for batch in microbatches(rollouts, range(4), 22, pad_id=0)] == [[1, 3], [2, 0]]


def test_refuses_what_cannot_be_trained():
    assert not trainable(make_rollout([1, 2], [1, 0]))
    with pytest.raises(ValueError, match=r"rollout q/0/0: expected at least one sampled token"):
        microbatches([make_rollout([1, 2], [0, 0])], [0], 10, pad_id=0)
    rollout = make_rollout([1, 2], [0, 1])
    rollout.logprobs.pop()
    with pytest.raises(ValueError, match=r"rollout q/0/0: .*differ in length"):
        microbatches([rollout], [0], 10, pad_id=0)


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=24), size=st.integers(2, 8), budget=st.integers(20, 90)
)
def test_every_rank_makes_equally_many_batches(packed, lengths, size, budget):
    """Their collectives have to meet: a rank that is two batches short would wait for ever."""
    rollouts = [make_rollout([i % 90 + 1, *range(length)], [0, *[1] * length]) for i, length in enumerate(lengths)]
    plans = [
        microbatches(rollouts, range(len(rollouts)), budget, 0, packed=packed, ranks=Ranks(rank, size))
        for rank in range(size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    trained = sorted(i for plan in plans for batch in plan if not batch.filler for i in batch.indices)
    assert trained == list(range(len(rollouts)))
