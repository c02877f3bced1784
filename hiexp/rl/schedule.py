"""Learning rate of a step: warmup, then constant, or falling along a line or half a cosine."""

from __future__ import annotations

import math

from hiexp.rl.config import AlgorithmConfig


def learning_rate(config: AlgorithmConfig, step: int) -> float:
    """The rate of training step ``step`` (from 1), a function of config and step alone, so nothing has to be resumed.

    It rises linearly over ``warmup_steps`` to ``lr``; a falling schedule takes it from there to ``lr * lr_final`` at
    step ``lr_decay_steps``, where it stays.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_schedule == "constant" or config.lr_decay_steps is None:
        return config.lr
    passed = min(1.0, (step - config.warmup_steps) / (config.lr_decay_steps - config.warmup_steps))
    left = 1.0 - passed if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
    return config.lr * (config.lr_final + (1.0 - config.lr_final) * left)
