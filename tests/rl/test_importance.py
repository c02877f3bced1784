"""Importance weights by hand in float64, and their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.rl.importance import importance_weights

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
CU = torch.tensor([0, 2, 5])
# Ratios of the first rollout 2 and 0.5, of the second 1.5, 1.5, 1.2.
RATIOS = torch.tensor([2.0, 0.5, 1.5, 1.5, 1.2], dtype=torch.float64)
ENGINE = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "cap", "weights", "cut"),
    [
        ("token_truncate", 1.4, [1.4, 0.5, 1.4, 1.4, 1.2], [1, 0, 1, 1, 0]),
        ("token_mask", 1.4, [0.0, 0.5, 0.0, 0.0, 1.2], [1, 0, 1, 1, 0]),
        ("sequence_truncate", 2.5, [1.0, 1.0, 2.5, 2.5, 2.5], [0, 0, 1, 1, 1]),
        ("sequence_mask", 2.5, [1.0, 1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1, 1]),
        ("sequence_mask", 3.0, [1.0, 1.0, 2.7, 2.7, 2.7], [0, 0, 0, 0, 0]),
        ("geometric_mask", 1.3, [1.0, 1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1, 1]),  # 2.7^(1/3) = 1.392
        ("geometric_mask", 1.4, [1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 0]),
    ],
)
def test_by_hand(mode, cap, weights, cut):
    found, marked = importance_weights(ENGINE + RATIOS.log(), ENGINE, CU, mode, cap)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64))
    assert marked.tolist() == [bool(c) for c in cut]


def test_geometric_rejects_from_below_too():
    found, marked = importance_weights(ENGINE - 1.0, ENGINE, CU, "geometric_mask", 2.0)
    assert found.tolist() == [0.0] * 5
    assert marked.all()


@settings(max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=5, max_size=5), st.sampled_from(MODES), st.floats(1.0, 5.0))
def test_weights_are_bounded_and_1_where_engines_agree(gaps, mode, cap):
    gap = torch.tensor(gaps, dtype=torch.float64)
    weights, cut = importance_weights(ENGINE + gap, ENGINE, CU, mode, cap)
    assert (weights >= 0).all()
    assert (weights <= cap).all()
    if mode.endswith("mask"):
        assert (weights[cut] == 0).all()
    agreeing, cut = importance_weights(ENGINE, ENGINE, CU, mode, cap)
    assert agreeing.tolist() == [1.0] * 5
    assert not cut.any()


def test_infinite_ratios_stay_finite():
    weights, _ = importance_weights(ENGINE + 500.0, ENGINE, CU, "sequence_truncate", 1e30)
    assert weights.tolist() == pytest.approx([math.exp(20)] * 5)


def test_unusable_settings():
    with pytest.raises(ValueError, match="importance_cap: expected at least 1"):
        importance_weights(ENGINE, ENGINE, CU, "geometric_mask", 0.5)
    with pytest.raises(ValueError, match="unknown mode 'turn_mask'"):
        importance_weights(ENGINE, ENGINE, CU, "turn_mask", 2.0)
