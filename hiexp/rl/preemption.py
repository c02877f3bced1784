"""Preemption: a cluster that takes the machine away sends a signal first; the run then ends in a whole checkpoint.

SIGTERM or SIGUSR1: the step under way is finished, a checkpoint is written, training stops; an evaluation that was due
is made when the run goes on. A second signal ends the process at once, as if nobody had been listening; the run then
continues from the checkpoint before.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: try again later.
EXIT_CODE = 75


class Preempted(RuntimeError):  # noqa: N818 - not an error of the run
    """Training stopped on a signal, behind a checkpoint of ``step``; the same command continues it."""

    def __init__(self, step: int) -> None:
        place = f"after step {step}, which is checkpointed" if step else "before the first step"
        super().__init__(f"stopped by a signal {place}; run the same command again")
        self.step = step


class Preemption:
    """Whether a signal has asked this process to stop; see :func:`watched`."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True


@contextmanager
def watched() -> Iterator[Preemption]:
    """Listen to :data:`SIGNALS` in the block; outside the main thread Python cannot, and nothing is ever asked."""
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, preemption.handle) for number in SIGNALS}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
