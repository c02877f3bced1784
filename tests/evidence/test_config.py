"""What each arm's training config is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiexp.evidence.config import ARMS, EvidenceConfig


def settings(name: str) -> tuple:
    config = EvidenceConfig().arm(name, 3, Path("run"), Path("policy"))
    experience, algorithm = config.experience, config.algorithm
    assert (config.run.seed, config.run.dir, config.model.path) == (3, "run", "policy")
    return (
        experience.experience_share, experience.start_top_k, experience.e1_threshold,
        algorithm.kind, algorithm.minibatches,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", (0.0, 2, 0.35, "grpo", 1)),
        ("all", (1.0, 2, 0.35, "grpo", 1)),
        ("half", (0.5, 2, 0.35, "grpo", 1)),
        ("e1", (1.0, 0, 0.35, "grpo", 1)),
        ("e23", (1.0, 2, 2.0, "grpo", 1)),
        ("placebo", (1.0, 2, 0.35, "grpo", 1)),
        ("gspo4-half", (0.5, 2, 0.35, "gspo", 4)),
    ],
)
def test_arms_differ_in_what_they_say(name: str, expected: tuple):
    assert settings(name) == expected


def test_every_loss_has_a_counterpart_that_differs_in_nothing_else():
    for name in ARMS:
        if name.startswith("gspo4-"):
            twin = settings(name.replace("gspo4", "grpo4"))
            assert settings(name) == (*twin[:3], "gspo", twin[4])
            assert twin[4] > 1  # with one update a step the two losses have the same gradient


def test_the_longer_arm_spends_what_the_hek_was_distilled_from():
    config = EvidenceConfig()
    spent = config.source.questions * config.source.group_size
    step = config.train.run.questions_per_step * config.train.rollout.group_size
    more = config.arm_steps("none-longer") - config.arm_steps("none")
    assert (more - 1) * step < spent <= more * step
    assert {config.arm_steps(name) for name in ARMS if name != "none-longer"} == {config.train.run.steps}
