"""Several processes that train one policy: who does what, and what they tell each other.

Every rank plans a step in the same way and does its share of it: whole groups of rollouts, whole micro-batches of the
update. Rollouts and log-probs are exchanged, so afterwards every rank knows the whole step and its metrics agree. Rank
0 alone writes. With one process nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of this run failed; the message says which one and why."""


class Ranks:
    """The processes of this run. ``rank`` of ``size``; the defaults are a run of one process."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """``work()`` on every rank; the results of all ranks, in rank order, on every rank.

        Raises:
            RankError: it failed on another rank. Where it failed on this one, its own exception.
        """
        if self.size == 1:
            return [work()]
        error: Exception | None = None
        outcome: tuple[str | None, T | None] = (None, None)
        try:
            outcome = (None, work())
        # Not swallowed: it is raised below, once the other ranks know.
        except Exception as caught:
            error, outcome = caught, (f"{type(caught).__name__}: {caught}", None)
        outcomes = self.gather(outcome)
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(outcomes):
            if failure is not None:
                raise RankError(f"rank {rank} of {self.size} failed, so all stop: {failure}")
        return [result for _, result in outcomes]  # type: ignore[misc]

    def on_main(self, work: Callable[[], T]) -> T:
        """``work()`` of rank 0, which alone does it, on every rank; its failure stops all."""
        results = self.together(work if self.main else lambda: None)
        return results[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """``value`` (anything that pickles) of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(values, value)
        # gloo and NCCL report a closed connection and a timeout this way.
        except RuntimeError as error:
            message = f"another process of this run ended or hangs, so rank {self.rank} stops ({error})"
            raise RankError(message) from error
        return values

    def share(self, keys: Sequence[Any]) -> slice:
        """This rank's rows: neighbours with equal ``keys`` stay together, ranks differ by one such group at most."""
        starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
        bounds = [*starts, len(keys)]
        first, after = (len(starts) * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(bounds[first], bounds[after])

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, key by key; a key that a rank lacks counts as 0. The order of addition is fixed."""
        totals: dict[str, float] = {}
        for part in self.gather(dict(values)):
            for key, value in part.items():
                totals[key] = totals.get(key, 0.0) + value
        return totals

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return any(self.gather(flag))

    def agree(self, name: str, value: Any) -> None:
        """Raise ValueError unless every rank has the same ``value`` of what is called ``name``."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                raise ValueError(f"{name}: expected the same on every rank, got {value!r} here and {other!r} on {rank}")


def balance(costs: Sequence[float], size: int) -> list[list[int]]:
    """Units of work for ``size`` ranks: the costliest first, each to the least loaded rank that has a place left.

    Every rank gets at most ceil(n / size) units. Returns their indices, an ascending list per rank.
    """
    places = -(-len(costs) // size)
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit)):
        rank = min((rank for rank in range(size) if len(shares[rank]) < places), key=lambda rank: (loads[rank], rank))
        shares[rank].append(unit)
        loads[rank] += costs[unit]
    return [sorted(share) for share in shares]


def to_cpu(scores: Mapping[int, Any]) -> dict[int, Any]:
    """Tensors by key, on the CPU, each with storage of its own: a pickled view would carry all it is a view of."""
    return {key: torch.clone(value).cpu() for key, value in scores.items()}
