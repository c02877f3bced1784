"""Learning-rate schedules: warmup, fall, floor, and settings that do not fit together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.rl.config import AlgorithmConfig, TrainConfig
from hiexp.rl.schedule import learning_rate


def rates(**settings):
    config = AlgorithmConfig(lr=2.0, **settings)
    return [learning_rate(config, step) for step in range(1, 13)]


def test_constant_after_the_warmup():
    assert rates(warmup_steps=4) == [0.5, 1.0, 1.5] + [2.0] * 9


def test_a_line_to_its_end():
    expected = [1.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.4, 0.4]
    got = rates(warmup_steps=2, lr_schedule="linear", lr_decay_steps=10, lr_final=0.2)
    assert got == pytest.approx(expected)


def test_half_a_cosine():
    got = rates(lr_schedule="cosine", lr_decay_steps=10)
    assert got[4] == pytest.approx(1.0)
    assert got[9:] == pytest.approx([0.0, 0.0, 0.0])
    assert got == sorted(got, reverse=True)


@given(st.integers(0, 20), st.integers(1, 50), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_never_above_lr_nor_below_its_final_share(warmup, fall, final, schedule):
    config = AlgorithmConfig(
        lr=1.0, warmup_steps=warmup, lr_schedule=schedule, lr_decay_steps=warmup + fall, lr_final=final
    )
    falling = [learning_rate(config, step) for step in range(max(warmup, 1), warmup + fall + 5)]
    assert all(final - 1e-12 <= rate <= 1.0 for rate in falling)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(final)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_schedule": "cosine"},
        {"lr_decay_steps": 5},
        {"lr_schedule": "linear", "lr_decay_steps": 3, "warmup_steps": 3},
    ],
)
def test_settings_that_do_not_fit(settings):
    with pytest.raises(ValueError, match=r"algorithm.lr_decay_steps: expected a step after warmup_steps"):
        TrainConfig.from_dict({"algorithm": settings})
