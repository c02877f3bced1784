"""A study in seconds, run once for all tests that look at its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hiexp.evidence.config import EvidenceConfig
from hiexp.evidence.job import evidence

TINY_ARMS = ("oracle", "none", "half", "teacher")


def tiny() -> EvidenceConfig:
    config = EvidenceConfig().short()
    train = config.train
    return replace(
        config,
        test_seen=16,
        test_reworded=4,
        test_unseen=4,
        warm_start=replace(config.warm_start, steps=2, batch_size=4),
        source=replace(config.source, questions=16, group_size=2, world_size=4),
        worlds=replace(config.worlds, training_size=4, evaluation_size=4),
        train=replace(
            train, rollout=replace(train.rollout, max_new_tokens=6), run=replace(train.run, questions_per_step=2)
        ),
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "study"
    evidence(tiny(), out, [0], TINY_ARMS, say=lambda line: None)
    return out
