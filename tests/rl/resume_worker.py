"""Run by test_resume.py in a process of its own: train a config, and die by SIGKILL at a chosen place.

Reads CONFIG (dict), KILL_AT_FLUSH (number or None) and KILL_AT_EVENT: ``(place, number)`` or None. Events are what the
process asks of the file system (open, rename, remove, make a folder) and the beginnings and ends of rollouts, gradients
and optimiser steps; they count from the first folder of a checkpoint on with ``place`` "save", from the first rollouts
on with "train".
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import Any

import torch

from hiexp.agent.rollout import SearchAgent
from hiexp.rl.config import TrainConfig
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.update import PolicyUpdate


def die() -> None:
    """As a machine that loses power does."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_flushes(kill_at: int | None) -> None:
    """Die at flush number ``kill_at`` (from 0), before the data reaches the disk."""
    flush, count = os.fsync, 0

    def counted(descriptor: int) -> None:
        nonlocal count
        if count == kill_at:
            die()
        count += 1
        flush(descriptor)

    os.fsync = counted


def count_events(place: str, number: int) -> None:
    """Die at event ``number`` from ``place`` on."""
    count: int | None = None

    def tick() -> None:
        nonlocal count
        if count is None and place == "train":
            count = 0
        if count == number:
            die()
        if count is not None:
            count += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "os.mkdir" and count is None and "/.step_" in str(arguments[0]):
            count = 0
        if count is not None and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            tick()

    sys.addaudithook(audit)
    for owner, name in [(SearchAgent, "run"), (PolicyUpdate, "_backward"), (torch.optim.AdamW, "step")]:
        setattr(owner, name, around(getattr(owner, name), tick))


def around(function: Any, tick: Any) -> Any:
    """``function`` between two events."""

    @functools.wraps(function)
    def between(*args: Any, **kwargs: Any) -> Any:
        tick()
        result = function(*args, **kwargs)
        tick()
        return result

    return between


def main(names: dict[str, Any]) -> None:
    """Train."""
    count_flushes(names.get("KILL_AT_FLUSH"))
    if names.get("KILL_AT_EVENT"):
        count_events(*names["KILL_AT_EVENT"])
    GRPOTrainer(TrainConfig.from_dict(names["CONFIG"])).train()


main(globals())
