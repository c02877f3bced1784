"""Where a training step gets its rollouts: the engine, its weights, and how far it runs ahead.

The trainer asks for the rollouts of a step and says when an update is done. Between lie three cases: the engine samples
from the trained model itself; it holds a copy (vLLM, a server) that gets every update; or it works ahead with weights
that are some updates old (staleness.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from hiexp.agent.record import Rollout
from hiexp.io import read_jsonl, write_jsonl
from hiexp.rl.config import TrainConfig
from hiexp.rl.distributed import Ranks
from hiexp.rl.lora import PlainWeights
from hiexp.rl.make_engine import training_engine
from hiexp.rl.staleness import Made, RolloutsAhead
from hiexp.rl.weight_sync import PROBE_TOKENS, LocalReplica, WeightSync
from hiexp.tasks.question import Question

T = TypeVar("T")
_PROBES = 8


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give its memory back while the trainer needs it."""

    def sleep(self) -> None:
        """Give it back."""
        ...

    def wake_up(self) -> None:
        """Take it back; weights must be pushed again."""
        ...


class RolloutSource:
    """The engine of a run and the weights it has.

    Args:
        config: all settings.
        model: what is trained, on its device.
        tokenizer: its tokenizer.
        ranks: the processes of the run.
        questions: some questions of the run; trainer and engine compare their log-probs on them.

    ``engine``: who samples.

    Raises:
        ValueError: settings that need one process, in several.
    """

    def __init__(
        self, config: TrainConfig, model: Any, tokenizer: Any, ranks: Ranks, questions: Sequence[Question]
    ) -> None:
        self._lag, self._last, self._model, self._ranks = config.rollout.staleness, config.run.steps, model, ranks
        if ranks.size > 1 and (self._lag > 0 or (config.rollout.engine == "vllm" and not config.rollout.server)):
            raise ValueError(
                f"rollout.engine, rollout.staleness: vLLM in process and rollouts ahead need one process, got "
                f"{ranks.size}; sample from a server instead"
            )
        self.engine, replica = training_engine(config, model, tokenizer)
        self._sync: WeightSync | None = None
        if replica is not None:
            longest = min(PROBE_TOKENS, self.engine.context_length - 1)
            probes = [list(tokenizer(one.text)["input_ids"])[:longest] for one in questions[:_PROBES]]
            self._sync = WeightSync(replica, probes, config.rollout.sync_tolerance)
        self._ahead: RolloutsAhead | None = None
        self._loaded: dict[str, Any] = {}
        self._current = replica is None  # whether the engine has the trainer's weights, or gets them in its queue

    def begin(self, step: int, sample: Callable[[int, int], list[Rollout]], folder: Path | None) -> None:
        """Go on after ``step`` updates; ``sample(step, policy_step)`` makes rollouts, ``folder`` is the checkpoint."""
        self._sample = sample
        if self._lag == 0:
            self.updated(step)
            return
        stored = {} if folder is None else _read(folder / "ahead")
        self._ahead = RolloutsAhead(sample, self._load, self._lag, self._last)
        self._ahead.begin(step, self._copy(), stored)
        self._current = True

    def rollouts(self, step: int) -> tuple[list[Rollout], dict[str, Any]]:
        """The rollouts of ``step`` and metrics of the weights they come from."""
        if self._ahead is not None:
            rollouts, metrics = self._ahead.take(step)
        else:
            rollouts, metrics = self._sample(step, step - 1), self._loaded
        return rollouts, {**metrics, "staleness": step - 1 - rollouts[0].policy_step if rollouts else 0}

    def rest(self) -> None:
        """The step has all its rollouts; an engine that can gives its memory back until the next update."""
        if self._ahead is None and isinstance(self.engine, Sleeper):
            self.engine.sleep()

    def updated(self, step: int) -> None:
        """Update ``step`` is done; the engine gets its weights."""
        if self._ahead is not None:
            self._ahead.updated(step, self._copy())
        elif self._sync is not None:
            if isinstance(self.engine, Sleeper):
                self.engine.wake_up()
            update = {"weights": self._weights(), "expected": self._sync.expected(self._model)}
            self._loaded = self._ranks.on_main(lambda: self._load(update))
            self._current = True

    def run(self, work: Callable[[], T]) -> T:
        """``work()``, which uses the engine, with the weights of the last update."""
        if not self._current:
            self.updated(0)
        return work() if self._ahead is None else self._ahead.run(work)

    def write(self, step: int, folder: Path) -> None:
        """What a checkpoint after ``step`` holds of this object."""
        for ahead, (rollouts, metrics) in (self._ahead.pending(step) if self._ahead is not None else {}).items():
            (folder / "ahead").mkdir(exist_ok=True)
            rows = [metrics, *(rollout.to_json() for rollout in rollouts)]
            write_jsonl(folder / "ahead" / f"step_{ahead:06d}.jsonl.gz", rows)

    def close(self) -> None:
        """Stop working ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead, self._current = None, False

    def _weights(self) -> Mapping[str, Any]:
        """The weights as the engine knows them: a copy of the model has adapter layers too, others hold a plain one."""
        assert self._sync is not None
        copied = isinstance(self._sync.replica, LocalReplica)
        weights: Mapping[str, Any] = self._model.state_dict() if copied else PlainWeights(self._model)
        return weights

    def _copy(self) -> dict[str, Any]:
        """The weights as they are now, untouched by later updates, and the trainer's log-probs of the probes."""
        assert self._sync is not None
        weights = {name: tensor.detach().clone() for name, tensor in self._weights().items()}
        return {"weights": weights, "expected": self._sync.expected(self._model)}

    def _load(self, update: Mapping[str, Any]) -> dict[str, Any]:
        assert self._sync is not None
        seconds = self._sync.push(update["weights"])
        expected: np.ndarray[Any, Any] = update["expected"]
        return {"seconds_sync": seconds, **self._sync.check(expected)}


def _read(folder: Path) -> dict[int, Made]:
    """Rollouts by step as :meth:`RolloutSource.write` stored them, metrics in the first line."""
    made = {}
    for path in sorted(folder.glob("step_*.jsonl.gz")):
        (_, metrics), *rows = read_jsonl(path)
        made[int(path.name.removeprefix("step_").split(".")[0])] = [Rollout.from_json(row) for _, row in rows], metrics
    return made
