"""Rewards to advantages: length penalty, KL in the reward, filters, each by hand, and the properties they must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.record import Rollout
from hiexp.rl.config import AlgorithmConfig, CreditConfig, TrainConfig
from hiexp.rl.credit import assign, filtered_groups, informative_groups, overlong_penalty

REWARDS = np.array([1.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0])
GROUPS = np.repeat([3, -1, 8, 5], 2)


def make_rollout(sampled, finish="answer"):
    mask = [0, 0, *[1] * sampled]
    n = len(mask)
    return Rollout("q/0/0", "q", "?", [1] * n, mask, [0.0] * n, [], [], [], None, 0, 0, "hiexp", finish, None)


ROLLOUTS = [make_rollout(4) for _ in REWARDS]


def credit_of(rewards=REWARDS, groups=GROUPS, rollouts=ROLLOUTS, algorithm=None, kl_penalty=None, **credit):
    return assign(
        rollouts, rewards, groups, AlgorithmConfig(**(algorithm or {})), CreditConfig(**credit),
        longest=10, kl_penalty=kl_penalty,
    )  # fmt: skip


def test_today_s_default():
    result = credit_of()
    assert result.trained == [0, 1]
    np.testing.assert_allclose(result.advantages[:2], np.array([0.5, -0.5]) / (np.sqrt(0.5) + 1e-6))
    assert result.metrics == {
        "overlong_penalty": 0.0, "filtered_groups": 0, "kl_penalty": None, "trained_rollouts": 2
    }  # fmt: skip


def test_advantages_follow_the_kind_unless_told_otherwise():
    rewards, groups = np.array([1.0, 0.0, 0.25, 0.0, 1.0]), np.array([0, 0, 0, 4, 4])
    rollouts = ROLLOUTS[:5]
    mean_only = credit_of(rewards, groups, rollouts, {"kind": "dr_grpo"}).advantages
    np.testing.assert_allclose(mean_only, [1 - 5 / 12, -5 / 12, 0.25 - 5 / 12, -0.5, 0.5])
    leave_one_out = credit_of(rewards, groups, rollouts, {"kind": "rloo"}).advantages
    np.testing.assert_allclose(leave_one_out, [1 - 0.125, -0.625, 0.25 - 0.5, -1.0, 1.0])
    told = credit_of(rewards, groups, rollouts, {"kind": "rloo", "advantage_preset": "dr_grpo"}).advantages
    np.testing.assert_allclose(told, mean_only)


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(1, 4))
def test_rloo_advantages_of_a_group_add_up_to_0(rewards, groups):
    values, labels = np.array(rewards), np.arange(len(rewards)) % groups
    rollouts = [ROLLOUTS[0]] * len(rewards)
    advantages = credit_of(values, labels, rollouts, {"kind": "rloo"}).advantages
    for label in range(groups):
        assert advantages[labels == label].sum() == pytest.approx(0.0, abs=1e-9)


# Length penalty, DAPO eq. 13: longest 10, buffer 4.


@pytest.mark.parametrize(
    ("sampled", "penalty"), [(1, 0), (6, 0), (7, 0.25), (8, 0.5), (9, 0.75), (10, 1), (11, 1), (40, 1)]
)
def test_overlong_penalty_by_hand(sampled, penalty):
    settings = CreditConfig(overlong_buffer=4, overlong_length=10, overlong_penalty=2.0)
    assert overlong_penalty([make_rollout(sampled)], settings, 99).tolist() == [2.0 * penalty]
    assert overlong_penalty([make_rollout(sampled)], CreditConfig(overlong_buffer=4), 10).tolist() == [penalty]


@given(st.integers(2, 60), st.data())
def test_overlong_penalty_has_no_jumps(longest, data):
    buffer = data.draw(st.integers(1, longest))
    settings = CreditConfig(overlong_buffer=buffer, overlong_length=longest)
    values = overlong_penalty([make_rollout(n) for n in range(1, 80)], settings, 1)
    assert (np.diff(values) >= 0).all()
    # A token costs at most its share of the buffer, also at both borders.
    assert (np.diff(values) <= 1 / buffer + 1e-12).all()
    assert values[-1] == 1.0
    assert (values >= 0).all()


def test_the_penalty_is_in_the_advantage_not_in_the_filters():
    rollouts = [make_rollout(4), make_rollout(9)] * 4
    result = credit_of(rollouts=rollouts, overlong_buffer=4, algorithm={"kind": "dr_grpo"})
    assert result.trained == list(range(8))
    np.testing.assert_allclose(result.advantages[4:6], [0.375, -0.375])
    assert result.metrics["overlong_penalty"] == pytest.approx(0.375)


def test_kl_in_the_reward_comes_before_the_advantages():
    penalty = np.array([0.2, 0.0, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0])
    result = credit_of(kl_penalty=penalty, algorithm={"kind": "dr_grpo"})
    np.testing.assert_allclose(result.advantages[:4], [0.4, -0.4, 0.1, -0.1])
    assert result.trained == [0, 1, 2, 3]
    assert result.metrics["kl_penalty"] == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("credit", "filtered"),
    [
        ({}, []),
        ({"filter_std": 0.0}, [-1, 5, 8]),
        ({"filter_std": 0.8}, [-1, 3, 5, 8]),
        ({"filter_low": 0.0}, [5]),
        ({"filter_high": 1.0}, [8]),
        ({"filter_low": 0.0, "filter_high": 1.0}, [5, 8]),
        ({"filter_low": 0.5}, [-1, 3, 5]),
    ],
)
def test_filters_by_hand(credit, filtered):
    settings = CreditConfig(**credit)
    assert filtered_groups(REWARDS, GROUPS, settings) == filtered
    assert informative_groups(REWARDS, GROUPS, settings) == [label for label in [3] if label not in filtered]
    result = credit_of(**credit)
    assert result.metrics["filtered_groups"] == len(filtered)
    assert result.trained == ([] if 3 in filtered else [0, 1])


def test_rewards_that_are_nan_do_not_decide():
    rewards, groups = np.array([np.nan, 1.0, 1.0, np.nan, np.nan]), np.array([0, 0, 0, 1, 1])
    assert informative_groups(rewards, groups, CreditConfig()) == []
    assert filtered_groups(rewards, groups, CreditConfig(filter_low=0.0)) == [1]


def test_truncated_rollouts_count_in_their_group_but_are_not_trained_on():
    rollouts = [make_rollout(4, "max_tokens"), make_rollout(4), make_rollout(4, "context"), make_rollout(4)]
    rewards, groups = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1])
    result = credit_of(rewards, groups, rollouts, drop_truncated=True)
    assert result.trained == [1, 3]
    assert (result.advantages[[1, 3]] > 0).all()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"credit": {"filter_low": 1.0, "filter_high": 0.5}}, "credit.filter_low: expected less than filter_high"),
        ({"credit": {"overlong_buffer": 9, "overlong_length": 8}}, "credit.overlong_buffer: expected at most"),
        ({"credit": {"kl_in_reward": True}, "algorithm": {"kl_coef": 0}}, "algorithm.kl_coef: expected a number > 0"),
        ({"algorithm": {"kl_coef": 0, "kl_target": 0.1}}, "algorithm.kl_coef: expected a number > 0"),
        ({"algorithm": {"importance_mode": "token_mask"}}, "algorithm.importance_cap: expected a number"),
        (
            {"algorithm": {"importance_cap": 2.0, "old_logprobs": "engine"}},
            "algorithm.importance_cap: expected null with old_logprobs 'engine', .* got 2",
        ),
        ({"credit": {"sampling_rounds": 0}}, "credit.sampling_rounds: expected a number >= 1"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: expected a number >= 2, got 1"),
        ({"alarms": {"stop": ["klx"]}}, "alarms.stop: expected names among kl, entropy"),
        ({"experience": {"dropout_final": 0.5}}, "experience.dropout_final, dropout_steps: expected both or neither"),
        ({"algorithm": {"loss_settings": {"tau": "x"}}}, "algorithm.loss_settings.tau: expected float, got str"),
    ],
)
def test_settings_that_contradict_each_other(stages, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig.from_dict(stages)
