"""group_advantage in exact terms: rational references, bits that depend on nothing but the rewards, torch operator."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp import group_advantage
from hiexp.ops._group_advantage_operator import operator


def exact(rewards, ddof, eps):
    """Advantages of one group by rational arithmetic and a 60-digit square root, rounded once."""
    values = [Fraction(float(r)) for r in rewards]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - ddof)
    if variance == 0:
        return [0.0] * len(values)
    digits = 10**60
    deviation = Fraction(math.isqrt(variance.numerator * variance.denominator * digits), variance.denominator)
    deviation /= 10**30
    return [float((v - mean) / (deviation + Fraction(eps))) for v in values]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1.0, 1.0, width=32), min_size=2, max_size=30),
    st.sampled_from([0.0, 1e6, -1e6, 3e9, 1e-20]),
    st.sampled_from([0, 1]),
)
def test_float32_equals_exact_arithmetic_to_1e_6(small, offset, ddof):
    rewards = (np.float64(offset) + np.array(small)).astype(np.float32)
    result = group_advantage(rewards, np.zeros(len(rewards), np.uint8), ddof=ddof)
    np.testing.assert_allclose(result.advantages, exact(rewards, ddof, 1e-6), rtol=1e-6, atol=1e-30)


def test_float64_beside_an_offset_of_1e6():
    # In float64 the spacing at 1e6 is 1.2e-10; the mean itself rounds there, the distances from it must not.
    rewards = 1e6 + np.array([0.0, 1e-9, 3e-9, 2e-9, 5e-9])
    result = group_advantage(rewards, [0] * 5, eps=0.0)
    np.testing.assert_allclose(result.advantages, exact(rewards, 1, 0), rtol=1e-13)


@pytest.mark.parametrize("size", [1e300, 2.0**1022, 1e-310])
def test_extreme_rewards_neither_overflow_nor_vanish(size):
    rewards = np.array([-size, size, 0.0, size])
    result = group_advantage(rewards, [0] * 4, eps=0.0)
    np.testing.assert_allclose(result.advantages, exact([-1.0, 1.0, 0.0, 1.0], 1, 0), rtol=1e-12)
    assert not result.zero_variance.any()


def test_a_reward_whose_differences_overflow_is_refused():
    with pytest.raises(ValueError, match=r"rewards\[1\]: expected a finite reward of at most 2\*\*1022, got 1e\+308"):
        group_advantage(np.array([0.0, 1e308]), [0, 0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(-4, 4), st.floats(-1e6, 1e6, width=32, allow_subnormal=False)), min_size=1, max_size=60
    ),
    st.randoms(use_true_random=False),
    st.sampled_from(["std", "batch"]),
)
def test_the_order_of_rows_does_not_change_a_bit(rows, random, scale):
    labels, rewards = (np.array(column) for column in zip(*rows, strict=True))
    result = group_advantage(rewards, labels, scale=scale)
    order = np.array(random.sample(range(len(rows)), len(rows)))
    shuffled = group_advantage(rewards[order], labels[order], scale=scale)
    np.testing.assert_array_equal(shuffled.advantages, result.advantages[order])
    for name in ("mean", "std", "counts", "groups"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(result, name))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=40), st.sampled_from([0.25, 2.0, 1024.0]), st.integers(-9, 9))
def test_shift_and_scale(rewards, factor, shift):
    # Small integers and powers of two: nothing rounds, so the advantages (eps 0) are equal to the last bit.
    rewards, labels = np.array(rewards, dtype=np.float64), np.arange(len(rewards)) % 3
    plain = group_advantage(rewards, labels, eps=0.0)
    moved = group_advantage(rewards * factor + shift * factor, labels, eps=0.0)
    np.testing.assert_array_equal(moved.advantages, plain.advantages)
    for label in range(3):
        assert abs(plain.advantages[labels == label].sum()) < 1e-12


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", ">i4", ">i8"]
)
def test_labels_of_every_integer_type(make, kind):
    labels = np.array([1, 0, 1, 1, 0, 0, 1])
    rewards = np.arange(7.0)
    expected = group_advantage(rewards, labels)
    typed = labels.astype(kind)
    native = np.asarray if ">" in kind else make  # torch has native byte order only
    result = group_advantage(make(rewards), native(typed))
    np.testing.assert_array_equal(result.advantages, expected.advantages)
    assert np.asarray(result.groups).tolist() == [0, 1]
    assert str(result.groups.dtype).endswith("int64")
    mixed = group_advantage(make(rewards), typed)  # numpy labels beside torch rewards
    np.testing.assert_array_equal(mixed.advantages, expected.advantages)


def test_misaligned_and_strided_inputs():
    rewards, labels = np.array([1.0, 0.0, 4.0, 2.0], np.float32), np.array([5, -5, 5, 5])
    expected = group_advantage(rewards, labels).advantages
    shifted = []
    for array in (rewards, labels):
        raw = np.zeros(array.nbytes + 1, np.uint8)
        raw[1:] = array.view(np.uint8)
        shifted.append(raw[1:].view(array.dtype))
        assert not shifted[-1].flags.aligned
    np.testing.assert_array_equal(group_advantage(*shifted).advantages, expected)
    pairs = torch.from_numpy(np.stack([labels, labels + 1], axis=1))
    np.testing.assert_array_equal(group_advantage(torch.from_numpy(rewards), pairs[:, 0]).advantages, expected)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_nothing_is_copied(monkeypatch, make):
    from hiexp.ops import _group_advantage_launch as launch

    seen, address = [], launch._address
    monkeypatch.setattr(launch, "_address", lambda value: seen.append(address(value)) or seen[-1])
    arrays = (np.array([1.0, 0.0], np.float32), np.array([3, 3], np.int32), np.ones((2, 3), bool))
    inputs = [make(array) for array in arrays]
    group_advantage(inputs[0], inputs[1], token_mask=inputs[2])
    assert {array.ctypes.data for array in arrays} <= set(seen)


def test_large_integer_rewards_of_torch_keep_their_digits():
    # 2^24 + 1 is no float32; the result is one.
    result = group_advantage(torch.tensor([2**24, 2**24 + 1]), [0, 0], scale="none")
    assert result.advantages.tolist() == [-0.5, 0.5]
    assert result.advantages.dtype == result.mean.dtype == torch.float32


def test_a_million_rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(-(2**62), 2**62, 60_000)[rng.integers(0, 60_000, 1_000_000)]
    rewards = rng.random(1_000_000).astype(np.float32)
    result = group_advantage(rewards, labels)
    groups, dense, counts = np.unique(labels, return_inverse=True, return_counts=True)
    mean = np.bincount(dense, rewards.astype(np.float64)) / counts
    np.testing.assert_array_equal(result.counts, counts)
    np.testing.assert_array_equal(result.groups, groups)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-6)
    std = np.sqrt(np.bincount(dense, (rewards - mean[dense]) ** 2) / (counts - 1))
    np.testing.assert_allclose(result.advantages, (rewards - mean[dense]) / (std[dense] + 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
def test_masks_of_every_type(kind):
    mask = np.array([[1, 0, 1], [0, 1, 0]]).astype(kind)
    if "float" in kind:
        mask[0, 1] = -0.0  # zero with a bit set
    for make in (np.asarray, torch.from_numpy):
        result = group_advantage(make(np.array([2.0, 0.0])), [0, 0], scale="none", token_mask=make(mask))
        assert result.token_advantages.tolist() == [[1.0, 0.0, 1.0], [0.0, -1.0, 0.0]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_packed_tokens_of_ragged_rollouts(lengths, seed):
    rng = np.random.default_rng(seed)
    rewards, labels = rng.normal(size=len(lengths)), rng.integers(0, 4, len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = rng.integers(0, 2, offsets[-1])
    result = group_advantage(rewards, labels, cu_seqlens=offsets, token_mask=mask)
    expected = np.repeat(result.advantages, lengths) * mask
    np.testing.assert_array_equal(result.token_advantages, expected)
    packed = group_advantage(torch.from_numpy(rewards), torch.from_numpy(labels), cu_seqlens=torch.from_numpy(offsets))
    np.testing.assert_array_equal(packed.token_advantages, np.repeat(result.advantages, lengths))


def test_offsets_that_are_wrong_write_nowhere():
    # The mask says 4 tokens: a fall, an end beyond it and a start before 0 must each be named, nothing else touched.
    rewards, mask = np.array([1.0, 0.0]), np.ones(4, bool)
    for offsets, match in (
        ([0, 3, 2], r"token_mask: expected shape \(2,\)"),
        ([0, 9, 4], r"cu_seqlens\[2\]: expected an offset >= 9, got 4"),
        ([-5, 2, 4], "start at 0"),
        ([0, -(2**40), 4], r"cu_seqlens\[1\]: expected an offset >= 0"),
    ):
        for make in (np.array, torch.tensor):
            with pytest.raises(ValueError, match=match):
                group_advantage(make(rewards), [0, 0], nan="zero", cu_seqlens=make(offsets), token_mask=make(mask))


def test_non_finite_row_is_a_flag():
    rewards = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    assert int(group_advantage(rewards, [0] * 4, nan="zero").non_finite_row) == 2
    assert int(group_advantage(rewards[:2], [0] * 2).non_finite_row) == -1


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("total", [0, 14])
def test_the_operator_passes_torchs_own_checks(rows, total):
    rewards, labels = torch.rand(rows, dtype=torch.float64), torch.arange(rows) % 3
    mask = torch.ones(rows * 2) if total else None
    size = rows * 2 if total else 0
    torch.library.opcheck(operator, (rewards, labels, None, mask, 2, size, "mean", "batch", 1, 1e-6, "raw", True))


@pytest.mark.parametrize("nan", ["raise", "zero"])
def test_under_torch_compile_without_a_graph_break(nan):
    def step(rewards, labels, mask):
        result = group_advantage(rewards * 2, labels, preset="trl", nan=nan, token_mask=mask)
        return result.advantages + 1, result.zero_variance, result.token_advantages

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for rows in (8, 12):
        rewards, labels = torch.rand(rows), torch.arange(rows) // 4
        mask = torch.ones(rows, 3, dtype=torch.bool)
        for actual, expected in zip(compiled(rewards, labels, mask), step(rewards, labels, mask), strict=True):
            assert torch.equal(actual, expected)
    if nan == "raise":
        with pytest.raises(ValueError, match=r"rewards\[3\]: expected a finite reward, got nan"):
            compiled(torch.tensor([0.0, 1.0, 0.0, float("nan")] * 2), torch.zeros(8, dtype=torch.int64), mask[:8])
