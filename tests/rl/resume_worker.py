"""Run by test_resume.py in a process of its own: train a config, and die by SIGKILL at a chosen place.

Reads CONFIG (dict), KILL_AT_FLUSH (number or None) and EVENTS: None, or a file and ``(place, number)`` or None. Events
are what the process asks of the file system (open, rename, remove, make a folder; Python's own modules excepted) and
the beginnings and ends of rollouts, turns and steps of the engine, gradients and optimiser steps. ``place`` says from
when on they count: "start" from the beginning of the process, "train" from the first rollouts, "save" from the first
folder of a checkpoint; "act" counts those of rollouts and the engine alone. A line goes to the file: the event at which
the process died, or where it did not, how many events there were by place, as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from typing import Any

import torch

from hiexp.agent.engine_transformers import TransformersEngine, TransformersSession
from hiexp.agent.rollout import SearchAgent
from hiexp.rl.config import TrainConfig
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.update import PolicyUpdate

ACTING = ("SearchAgent", "TransformersEngine", "TransformersSession")
PYTHON = (sys.prefix, sys.base_prefix, "/proc/", "/sys/")


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


class Events:
    """Counts events by place and dies at one of them."""

    def __init__(self, notes: str, kill_at: tuple[str, int] | None) -> None:
        self.counts: dict[str, int] = {"start": 0, "act": 0}
        # A descriptor from the beginning: opening it later would be an event.
        self._notes, self._kill_at = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT), kill_at
        sys.addaudithook(self.audit)
        for owner, name in [
            (TransformersEngine, "open"), (TransformersSession, "start"), (TransformersSession, "_step"),
            (PolicyUpdate, "_backward"), (torch.optim.AdamW, "step"),
        ]:  # fmt: skip
            setattr(owner, name, self.around(getattr(owner, name), f"{owner.__name__}.{name}"))
        SearchAgent.stream = self.around_rollouts(SearchAgent.stream)

    def tick(self, event: str) -> None:
        """One event."""
        for place, count in self.counts.items():
            if place == "act" and not event.startswith(ACTING):
                continue
            if (place, count) == self._kill_at:
                self.note(event)
                die()
            self.counts[place] = count + 1

    def note(self, line: str) -> None:
        """Add a line to the file."""
        os.write(self._notes, f"{line}\n".encode())

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by Python."""
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if event == "os.mkdir" and "/.step_" in path:
            self.counts.setdefault("save", 0)
        if not path.startswith(PYTHON):
            self.tick(event)

    def around(self, function: Any, name: str) -> Any:
        """``function`` between two events."""

        @functools.wraps(function)
        def between(*args: Any, **kwargs: Any) -> Any:
            self.tick(name)
            result = function(*args, **kwargs)
            self.tick(name)
            return result

        return between

    def around_rollouts(self, stream: Any) -> Any:
        """``SearchAgent.stream`` with an event before the first rollout and behind each."""

        @functools.wraps(stream)
        def between(*args: Any, **kwargs: Any) -> Any:
            self.counts.setdefault("train", 0)
            self.tick("SearchAgent.stream")
            for rollout in stream(*args, **kwargs):
                self.tick("SearchAgent.stream")
                yield rollout

        return between


def main(names: dict[str, Any]) -> None:
    """Train."""
    count_flushes(names.get("KILL_AT_FLUSH"))
    events = Events(*names["EVENTS"]) if names.get("EVENTS") else None
    GRPOTrainer(TrainConfig.from_dict(names["CONFIG"])).train()
    if events is not None:
        events.note(json.dumps(events.counts))


main(globals())
