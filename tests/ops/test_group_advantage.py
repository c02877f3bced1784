"""group_advantage: parity with each stack's own formula, invariants, odd groups, precision, tokens, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp import group_advantage
from hiexp.ops import reference
from hiexp.ops.group_advantage import PRESETS

REWARDS = [1.0, 0.0, 0.5, 0.25, -1.0, 2.0, 3.0, 0.0]
GROUPS = [7, 7, 7, 7, -3, -3, -3, -3]


def _stack(name, group):
    """What each stack writes for one group of at least two rewards (torch, float64)."""
    centred = group - group.mean()
    n = len(group)
    return {
        "verl": lambda: centred / (torch.std(group) + 1e-6),
        "trl": lambda: centred / (group.std() + 1e-4),
        "trl_async": lambda: centred / (group.std(unbiased=False) + 1e-8),
        "openrlhf": lambda: centred / (group.std() + 1e-9),
        "slime": lambda: centred / (group.std() + 1e-6),
        "prime_rl": lambda: centred,
        "dr_grpo": lambda: centred,
        "rloo": lambda: group - (group.sum() - group) / (n - 1),
    }[name]()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_equals_the_stacks_own_formula(preset, assert_close):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    expected = torch.cat([_stack(preset, rewards[:4]), _stack(preset, rewards[4:])])
    assert_close(group_advantage(rewards, GROUPS, preset=preset).advantages, expected, torch.float64)


def test_hand_computed_vector(assert_close):
    # mean 1/2, ddof 1: variance (4 * 1/4) / 3 = 1/3
    result = group_advantage(np.array([1.0, 0.0, 0.0, 1.0]), [5, 5, 5, 5], eps=0.0)
    root3 = 3**0.5
    assert_close(result.advantages, [root3 / 2, -root3 / 2, -root3 / 2, root3 / 2], "float64")
    assert_close(result.std, [1 / root3], "float64")


ragged = st.lists(
    st.tuples(
        st.sampled_from([-(2**62), -1, 0, 3, 10**15, 2**63 - 1]), st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0, 7.3])
    ),
    min_size=1,
    max_size=40,
)
choices = st.fixed_dictionaries(
    {
        "baseline": st.sampled_from(["mean", "leave_one_out", "none"]),
        "scale": st.sampled_from(["std", "none", "batch"]),
        "ddof": st.sampled_from([0, 1]),
        "eps": st.sampled_from([1e-6, 1e-4, 0.3]),
        "singleton": st.sampled_from(["zero", "raw"]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ragged, choices)
def test_equals_the_reference_on_ragged_groups(assert_close, rows, options):
    labels, rewards = zip(*rows, strict=True)
    result = group_advantage(np.array(rewards), np.array(labels), **options)
    assert_close(result.advantages, reference.group_advantage(rewards, labels, **options), "float64")
    unique, counts = np.unique(labels, return_counts=True)
    np.testing.assert_array_equal(result.groups, unique)
    np.testing.assert_array_equal(result.counts, counts)
    assert_close(result.mean, [np.mean(np.array(rewards)[np.array(labels) == g]) for g in unique], "float64")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ragged, st.randoms(use_true_random=False), st.sampled_from([-3.0, 1e4]))
def test_invariants(assert_close, rows, random, shift):
    labels, rewards = (np.array(column) for column in zip(*rows, strict=True))
    advantages = group_advantage(rewards, labels).advantages
    for label in np.unique(labels):
        assert abs(advantages[labels == label].sum()) < 1e-8  # mean 0 in every group
    order = np.array(random.sample(range(len(rewards)), len(rewards)))
    assert_close(group_advantage(rewards[order], labels[order]).advantages, advantages[order], "float64")
    moved = group_advantage(rewards + shift, labels).advantages
    np.testing.assert_allclose(moved, advantages, atol=1e-5)  # rewards + shift is itself rounded


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_offset_keeps_its_digits(dtype, assert_close):
    # Sum of squares minus squared sum in the rewards' own precision would give noise here.
    small = np.array([0.0, 1.0, 0.0, 3.0])
    rewards = (1e6 + small).astype(dtype)
    result = group_advantage(rewards, [0] * 4, eps=0.0)
    assert_close(result.advantages, (small - 1.0) / np.std(small, ddof=1), dtype)
    assert result.advantages.dtype == rewards.dtype


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -1e-30])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_rewards_are_exactly_degenerate(value, count):
    # 3 * 0.1 / 3 is not 0.1 in floating point: a naive mean leaves a variance of 1e-34 and calls the group contrastive.
    result = group_advantage(np.full(count, value), np.zeros(count, dtype=int), eps=0.0)
    assert result.zero_variance.all()
    assert not result.advantages.any()
    assert result.std[0] == 0.0


def test_rewards_one_ulp_apart_are_not_degenerate():
    result = group_advantage(np.array([1.0, np.nextafter(1.0, 2.0)]), [4, 4])
    assert not result.zero_variance.any()


def test_no_division_by_eps_alone():
    # Baseline "none" keeps r: divided by std 0 + 1e-6 it would be a million times too large.
    assert not group_advantage(np.array([1.0, 1.0]), [0, 0], baseline="none").advantages.any()


def test_singletons():
    zero = group_advantage(np.array([5.0, 1.0, 3.0]), [9, 2, 2])
    assert zero.advantages[0] == 0.0
    assert zero.zero_variance.tolist() == [True, False, False]
    raw = group_advantage(np.array([5.0, 1.0, 3.0]), [9, 2, 2], preset="verl")
    assert raw.advantages[0] == 5.0
    assert raw.zero_variance.tolist() == [False, False, False]  # leaving it out of the loss would drop a signal
    assert zero.std.tolist()[1] == 0.0


def test_explicit_argument_wins_over_the_preset():
    assert group_advantage(np.array([5.0]), [9], preset="verl", singleton="zero").advantages[0] == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_non_finite_reward(bad, make):
    rewards, labels = make([1.0, 2.0, bad, 3.0]), [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r'rewards\[2\]: expected a finite reward, got -?(nan|inf); nan="zero"'):
        group_advantage(rewards, labels)
    result = group_advantage(rewards, labels, nan="zero", scale="none")
    # Row 2 stays out of the mean: counted as 0 it would drag the group's mean down.
    assert result.advantages.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert result.counts.tolist() == [2, 1]
    assert result.zero_variance.tolist() == [False, False, True, True]


def test_group_of_nothing_but_nan():
    result = group_advantage(np.array([np.nan, np.nan]), [1, 1], nan="zero", scale="batch")
    assert result.advantages.tolist() == [0.0, 0.0]
    assert (result.counts[0], result.mean[0], result.std[0]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_one_row(n):
    result = group_advantage(np.ones(n, dtype=np.float32), np.arange(n))
    assert result.advantages.shape == result.zero_variance.shape == (n,)
    assert result.mean.shape == result.counts.shape == result.groups.shape == (n,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_torch_equals_numpy(dtype, assert_close):
    rewards = torch.tensor([1, 0, 3, 2, 2, 2, 5], dtype=dtype)
    labels = torch.tensor([4, 4, 4, -1, -1, 0, 4])
    result = group_advantage(rewards, labels)
    expected = reference.group_advantage(rewards.double().numpy(), labels.numpy())
    assert isinstance(result.advantages, torch.Tensor)
    assert result.advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.zero_variance.dtype == torch.bool
    assert_close(result.advantages, expected, result.advantages.dtype)


def test_no_gradient_and_no_write_to_the_input():
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    before = rewards.detach().clone()
    result = group_advantage(rewards, [0, 0])
    assert not result.advantages.requires_grad
    assert torch.equal(rewards.detach(), before)


def test_layouts_that_are_not_contiguous_native_arrays(assert_close):
    base = np.array([1.0, 9.0, 0.0, 9.0, 4.0, 9.0])
    expected = reference.group_advantage([1.0, 0.0, 4.0], [0, 0, 0])
    frozen = base[::2].copy()
    frozen.flags.writeable = False
    for rewards in (base[::2], base[::2].astype(">f8"), frozen, [1.0, 0.0, 4.0], base[::2].astype(int)):
        assert_close(group_advantage(rewards, np.zeros(3, dtype=np.int8)).advantages, expected, "float64")


def test_padded_tokens():
    mask = np.array([[1, 1, 0], [0, 1, 0]])
    result = group_advantage(np.array([2.0, 0.0]), [0, 0], scale="none", token_mask=mask)
    assert result.token_advantages.tolist() == [[1.0, 1.0, 0.0], [0.0, -1.0, 0.0]]


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_packed_tokens(make):
    rewards, labels, offsets = make([2.0, 0.0, 4.0]), make([0, 0, 1]), make([0, 2, 2, 5])
    result = group_advantage(rewards, labels, scale="none", singleton="raw", cu_seqlens=offsets)
    assert result.token_advantages.tolist() == [1.0, 1.0, 4.0, 4.0, 4.0]
    masked = group_advantage(
        rewards, labels, scale="none", singleton="raw", cu_seqlens=offsets, token_mask=make([0, 1, 1, 0, 1])
    )
    assert masked.token_advantages.tolist() == [0.0, 1.0, 4.0, 0.0, 4.0]


TWO = np.array([1.0, 0.0])


@pytest.mark.parametrize(
    ("rewards", "labels", "options", "error", "match"),
    [
        (TWO, [0], {}, ValueError, r"group_ids: expected shape \(2,\) .*got \(1,\)"),
        (TWO, [0.5, 1.0], {}, TypeError, "group_ids: expected integer labels, got float64"),
        (TWO, torch.tensor([0.5, 1.0]), {}, TypeError, "group_ids: expected integer labels, got float32"),
        (TWO, ["a", "b"], {}, TypeError, "group_ids: expected integer labels"),
        (TWO, np.array([0, 2**63], dtype=np.uint64), {}, ValueError, r"group_ids: expected labels below 2\*\*63"),
        (np.ones((2, 2)), [0, 1], {}, ValueError, "rewards: expected a 1-D array"),
        (["x", "y"], [0, 1], {}, TypeError, "rewards: expected real numbers"),
        ([1.0, [2.0]], [0, 1], {}, TypeError, "rewards: expected a 1-D array of numbers"),
        (np.array([1j, 0]), [0, 1], {}, TypeError, "rewards: expected real numbers"),
        (TWO, [0, 0], {"baseline": "median"}, ValueError, "baseline: expected one of 'mean', .*got 'median'"),
        (TWO, [0, 0], {"scale": 1}, TypeError, "scale: expected a string"),
        (TWO, [0, 0], {"singleton": "drop"}, ValueError, "singleton: expected one of 'zero', 'raw'"),
        (TWO, [0, 0], {"preset": "grpo"}, ValueError, "preset: expected one of 'verl'"),
        (TWO, [0, 0], {"ddof": 2}, ValueError, "ddof: expected 0 or 1, got 2"),
        (TWO, [0, 0], {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        (TWO, [0, 0], {"eps": "tiny"}, TypeError, "eps: expected a number"),
        (TWO, [0, 0], {"nan": "skip"}, ValueError, "nan: expected one of 'raise', 'zero', got 'skip'"),
        (TWO, [0, 0], {"token_mask": np.ones((3, 4))}, ValueError, r"token_mask: expected shape \(2, T\)"),
        (TWO, [0, 0], {"cu_seqlens": [0, 2]}, ValueError, "cu_seqlens: expected 3 offsets"),
        (TWO, [0, 0], {"cu_seqlens": [0, 3, 2]}, ValueError, r"cu_seqlens\[2\]: expected an offset >= 3, got 2"),
        (TWO, [0, 0], {"cu_seqlens": [1, 2, 3]}, ValueError, "cu_seqlens: expected offsets that start at 0"),
        (TWO, [0, 0], {"cu_seqlens": [0.0, 1.0, 2.0]}, TypeError, "cu_seqlens: expected a 1-D integer array"),
        (TWO, [0, 0], {"cu_seqlens": [0, 1, 2], "token_mask": [1]}, ValueError, r"token_mask: expected shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(rewards, labels, options, error, match):
    with pytest.raises(error, match=match):
        group_advantage(rewards, labels, **options)


def test_cuda_module_loads_without_a_driver():
    cuda = pytest.importorskip("hiexp._cuda", reason="built without a CUDA compiler")
    assert cuda.device_count() >= 0
    assert "sm_80" in list(cuda.architectures)
