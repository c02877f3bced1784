"""group_advantage against the installed packages' own functions, on ragged groups with singletons and large offsets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from hiexp import group_advantage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def verl():
    path = ROOT / "benchmarks" / "verl_functions.py"
    if not path.exists():
        pytest.skip("needs the checkout")
    spec = importlib.util.spec_from_file_location("verl_functions", path)
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader.load() or pytest.skip("verl is not installed")


def make_batch(seed=0, rows=200):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.integers(-9, 30, rows), [1000, 2000]])  # two singletons at least
    return torch.from_numpy(rng.choice([0.0, 0.25, 1.0, 3.5], size=rows + 2).astype(np.float32)), labels


@pytest.mark.parametrize("function", ["compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage"])
@pytest.mark.parametrize("by_std", [True, False])
def test_verl_grpo(verl, function, by_std, assert_close):
    rewards, labels = make_batch()
    if "vectorized" in function:
        labels = labels - labels.min()  # its index_add takes no negative labels
    mask = (torch.arange(5)[None] <= torch.arange(len(rewards))[:, None] % 5).long()
    token_rewards = torch.zeros(len(rewards), 5)
    token_rewards[:, 0] = rewards
    expected, _ = getattr(verl, function)(token_rewards, mask, labels, norm_adv_by_std_in_grpo=by_std)
    result = group_advantage(rewards, labels, preset="verl", scale="std" if by_std else "none", token_mask=mask)
    # verl's own float32 noise in groups without variance, divided by 1e-6, is not an advantage.
    live = ~result.zero_variance
    assert live.sum() > 150
    assert_close(result.token_advantages[live], expected[live], torch.float32)


@pytest.mark.parametrize("function", ["compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage"])
def test_verl_rloo(verl, function, assert_close):
    rewards, labels = make_batch(1)
    expected, _ = getattr(verl, function)(rewards[:, None].clone(), torch.ones(len(rewards), 1), labels)
    # Of a singleton, the first function keeps the reward and the second makes 0.
    singleton = "zero" if "vectorized" in function else "raw"
    result = group_advantage(rewards, labels, preset="rloo", singleton=singleton)
    assert_close(result.advantages, expected[:, 0], torch.float32)


def _trl(rewards, size, scale):
    """The lines of GRPOTrainer._generate_and_score_completions, around TRL's own nanstd."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    mean = torch.nanmean(rewards.view(-1, size), dim=1).repeat_interleave(size)
    group = nanstd(rewards.view(-1, size), dim=1).repeat_interleave(size)
    std = {"std": group, "batch": nanstd(rewards).expand_as(rewards), "none": None}[scale]
    advantages = rewards - mean
    return torch.nan_to_num(advantages if std is None else advantages / (std + 1e-4), nan=0.0)


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_trl_with_unscorable_rows(scale, assert_close):
    rewards = torch.rand(64, 8, generator=torch.Generator().manual_seed(2)).flatten()
    rewards[::13] = float("nan")
    rewards[:7] = float("nan")  # one usable reward is left in the first group
    labels = torch.arange(64).repeat_interleave(8)
    result = group_advantage(rewards, labels, preset="trl", scale=scale, nan="zero")
    assert_close(result.advantages, _trl(rewards, 8, scale), torch.float32)


def test_trl_async(assert_close):
    scored = np.array([1.0, 0.0, 0.0, 0.5])
    expected = (scored - scored.mean()) / (scored.std() + 1e-8)  # numpy's std, ddof 0
    result = group_advantage(np.array([1.0, 0.0, np.nan, 0.0, 0.5]), [3] * 5, preset="trl_async", nan="zero")
    assert_close(result.advantages, np.insert(expected, 2, 0.0), "float64")
