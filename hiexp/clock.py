"""Seconds by part of a step: always on, because reading the clock twice costs less than a microsecond.

The clock is that of the host. On CUDA, kernels run behind it, and their time counts for the part that waits for them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall time by name until it is taken; parts must not be nested, or time counts twice."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside counts for ``name``, also where it ends with an exception."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """``seconds_NAME`` of every part since the last call."""
        taken = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
