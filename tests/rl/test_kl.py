"""The adaptive KL coefficient: Ziegler's formula by hand, and that it moves towards the target from either side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.rl.kl import KLController


def test_by_hand():
    controller = KLController(0.1, target=0.05, horizon=1000)
    controller.update(0.055, 100)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    controller.update(5.0, 100)  # the error is bounded by 0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, 100)
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


@given(st.floats(1e-6, 10), st.floats(1e-4, 1), st.floats(1e-6, 10), st.integers(1, 10**6))
def test_it_moves_towards_the_target(coefficient, target, kl, rollouts):
    controller = KLController(coefficient, target=target, horizon=1000)
    controller.update(kl, rollouts)
    assert (controller.coefficient > coefficient) == (kl > target) or kl == pytest.approx(target)
    assert 0.8 * coefficient <= controller.coefficient * (1 + 1e-12)
    assert controller.coefficient <= 1.2 * coefficient * (1 + 1e-12)


def test_it_settles_at_the_target():
    """A policy whose KL falls with the coefficient: the loop ends where the KL is the target."""
    controller = KLController(1e-3, target=0.05, horizon=64)
    for _ in range(400):
        controller.update(0.001 / controller.coefficient, 64)
    assert 0.001 / controller.coefficient == pytest.approx(0.05, rel=0.01)


def test_a_fixed_coefficient_stays_and_nothing_trained_changes_nothing():
    fixed = KLController(0.1)
    fixed.update(100.0, 10)
    fixed.load_state_dict({"coefficient": 7.0})
    assert fixed.coefficient == 0.1
    adaptive = KLController(0.1, target=0.05)
    adaptive.update(None, 10)
    assert adaptive.coefficient == 0.1


def test_state_goes_round():
    first = KLController(0.1, target=0.05, horizon=10)
    first.update(1.0, 5)
    second = KLController(0.1, target=0.05, horizon=10)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(0.01, 5)
    assert first.coefficient == second.coefficient != 0.1
