"""Rollouts made ahead of the step that trains on them, by weights that are a bounded number of updates old.

The rule: rollouts of step s come from the weights after update max(0, s - 1 - lag). While step s is trained, those of
the steps up to s + lag are made. The rule says which weights, never "the newest there are", so speed has no influence
on results and a continued run equals an uninterrupted one. What a checkpoint after step s cannot make again, because
the weights are gone, are the rollouts of steps s + 1 to s + lag: it stores them. Nothing is made beyond the last step,
so where ``run.steps`` is raised later, the first steps that were not planned come from the checkpoint's weights, less
stale than the rule says, as the first steps of a run do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from hiexp.agent.record import Rollout

T = TypeVar("T")
Metrics = dict[str, Any]
Made = tuple[list[Rollout], Metrics]  # rollouts, and what loading the weights behind them reported


def policy_step(step: int, lag: int) -> int:
    """The update whose weights make the rollouts of ``step``."""
    return max(0, step - 1 - lag)


class RolloutsAhead:
    """One worker thread that loads weights and makes rollouts, in the order of the steps.

    Args:
        sample: ``sample(step, policy_step)`` makes the rollouts of a step; called in the worker alone.
        load: gives the engine new weights and returns metrics about it; called in the worker alone.
        lag: most updates the weights of a rollout may be old, at least 1.
        last: last step that is trained; nothing is made beyond it.
    """

    def __init__(
        self,
        sample: Callable[[int, int], list[Rollout]],
        load: Callable[[Mapping[str, Any]], Metrics],
        lag: int,
        last: int,
    ) -> None:
        if lag < 1:
            raise ValueError(f"lag: expected at least 1, got {lag}")
        self._sample, self._load, self.lag, self.last = sample, load, lag, last
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hiexp-rollouts")
        self._made: dict[int, Future[Made]] = {}
        self._loaded: Future[Metrics] | None = None

    def begin(self, step: int, weights: Mapping[str, Any], stored: Mapping[int, Made]) -> None:
        """Go on after ``step`` updates with ``weights``, which nobody may change; ``stored``: see :meth:`pending`."""
        for ahead in stored.keys() & set(range(step + 1, step + self.lag + 1)):
            self._made[ahead] = Future()
            self._made[ahead].set_result(stored[ahead])
        self.updated(step, weights)

    def updated(self, step: int, weights: Mapping[str, Any]) -> None:
        """Update ``step`` is done: queue its weights and what is to be made with them."""
        self._loaded = self._worker.submit(self._load, weights)
        # One step is missing; after begin() all lag + 1, but for the stored ones.
        for ahead in range(step + 1, min(step + 1 + self.lag, self.last) + 1):
            if ahead not in self._made:
                self._made[ahead] = self._worker.submit(self._make, self._loaded, ahead, step)

    def _make(self, loaded: Future[Metrics], step: int, policy: int) -> Made:
        metrics = loaded.result()  # raises where loading failed: rollouts would be of other weights
        return self._sample(step, policy), metrics

    def take(self, step: int) -> Made:
        """The rollouts of ``step``; waits for them. Each step can be taken once."""
        return self._made.pop(step).result()

    def run(self, work: Callable[[], T]) -> T:
        """``work()`` in the worker, with the weights of the last update, after the rollouts queued so far."""
        return self._worker.submit(self._after_load, self._loaded, work).result()

    def _after_load(self, loaded: Future[Metrics] | None, work: Callable[[], T]) -> T:
        if loaded is not None:
            loaded.result()
        return work()

    def pending(self, step: int) -> dict[int, Made]:
        """What a checkpoint after ``step`` must store: rollouts of later steps by weights older than its own."""
        return {
            ahead: made.result() for ahead, made in sorted(self._made.items()) if policy_step(ahead, self.lag) < step
        }

    def close(self) -> None:
        """Forget what is queued; waits for what is under way."""
        self._worker.shutdown(wait=True, cancel_futures=True)
