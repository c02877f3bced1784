"""Where a training step gets its rollouts: the engine, its weights, and how far it runs ahead.

The trainer asks for the rollouts of a step and says when an update is done. Between lie three cases: the engine samples
from the trained model itself; it holds a copy (vLLM, a server) that gets every update; or it works ahead with weights
that are some updates old (staleness.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hiexp.agent.record import Rollout
from hiexp.io import read_jsonl, write_jsonl
from hiexp.rl.config import TrainConfig
from hiexp.rl.distributed import Ranks
from hiexp.rl.make_engine import training_engine
from hiexp.rl.staleness import RolloutsAhead, policy_step
from hiexp.rl.weight_sync import PROBE_TOKENS, WeightSync
from hiexp.tasks.question import Question

T = TypeVar("T")
_PROBES = 8


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

    def rollouts(self, step: int) -> list[Rollout]:
        """The rollouts of ``step``."""
        if self._ahead is not None:
            return self._ahead.take(step)
        rollouts = self._sample(step, step - 1)
        if hasattr(self.engine, "sleep"):
            self.engine.sleep()
        return rollouts

    def updated(self, step: int) -> dict[str, Any]:
        """Update ``step`` is done; gives the engine its weights and returns metrics about that."""
        metrics: dict[str, Any] = {"staleness": step - 1 - policy_step(step, self._lag)} if step > 0 else {}
        if self._ahead is not None:
            metrics |= self._ahead.metrics()
            self._ahead.updated(step, self._copy())
        elif self._sync is not None:
            if hasattr(self.engine, "wake_up"):
                self.engine.wake_up()
            weights = self._model.state_dict()
            expected = self._sync.expected(self._model)
            metrics |= self._ranks.on_main(lambda: self._load({"weights": weights, "expected": expected}))
            self._current = True
        return metrics

    def run(self, work: Callable[[], T]) -> T:
        """``work()``, which uses the engine, with the weights of the last update."""
        if not self._current:
            self.updated(0)
        return work() if self._ahead is None else self._ahead.run(work)

    def write(self, step: int, folder: Path) -> None:
        """What a checkpoint after ``step`` holds of this object."""
        for ahead, rollouts in (self._ahead.pending(step) if self._ahead is not None else {}).items():
            (folder / "ahead").mkdir(exist_ok=True)
            rows = [rollout.to_json() for rollout in rollouts]
            write_jsonl(folder / "ahead" / f"step_{ahead:06d}.jsonl.gz", rows)

    def close(self) -> None:
        """Stop working ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead, self._current = None, False

    def _copy(self) -> dict[str, Any]:
        """The weights as they are now, untouched by later updates, and the trainer's log-probs of the probes."""
        weights = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        return {"weights": weights, "expected": None if self._sync is None else self._sync.expected(self._model)}

    def _load(self, update: Mapping[str, Any]) -> dict[str, Any]:
        assert self._sync is not None
        seconds = self._sync.push(update["weights"])
        expected: np.ndarray[Any, Any] = update["expected"]
        return {"seconds_sync": seconds, **self._sync.check(expected)}


def _read(folder: Path) -> dict[int, list[Rollout]]:
    """Rollouts by step as :meth:`RolloutSource.write` stored them."""
    return {
        int(path.name.removeprefix("step_").split(".")[0]): [Rollout.from_json(row) for _, row in read_jsonl(path)]
        for path in sorted(folder.glob("step_*.jsonl.gz"))
    }
