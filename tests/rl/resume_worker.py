"""Run by test_resume.py in a process of its own: train a config, and die by SIGKILL at a chosen place.

Reads CONFIG (dict), KILL_AT_FLUSH (number or None) and KILL_AT_CALL: ``(armed, after)`` or None, the number of calls of
the library's functions after the first call of one named ``armed``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from hiexp.rl.config import TrainConfig
from hiexp.rl.trainer import GRPOTrainer


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


def count_calls(armed: str, after: int) -> None:
    """Die at call number ``after`` made by hiexp.rl or hiexp.io, counted from the first call of ``armed``."""
    count: int | None = None

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        code = frame.f_code
        # Calls into C (open, rename, fsync, unlink) from there count too, so that death falls between any two of them.
        if event not in ("call", "c_call") or not ("/hiexp/rl/" in code.co_filename or "/hiexp/io" in code.co_filename):
            return
        if count is None:
            count = 0 if code.co_name == armed else None
        elif count == after:
            die()
        else:
            count += 1

    sys.setprofile(profile)


def main(names: dict[str, Any]) -> None:
    """Train."""
    count_flushes(names.get("KILL_AT_FLUSH"))
    if names.get("KILL_AT_CALL"):
        count_calls(*names["KILL_AT_CALL"])
    GRPOTrainer(TrainConfig.from_dict(names["CONFIG"])).train()


main(globals())
