"""From the losses of micro-batches to one optimiser step: the part of an update that depends on accelerate's engine."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Gradients:
    """Gradients of one process, DDP or FSDP2. :class:`hiexp.rl.zero.ZeroGradients` is the same for DeepSpeed.

    Args:
        scorer: the policy, prepared by accelerate.
        optimizer: its optimiser, prepared by accelerate.
        accelerator: the engine.
        max_norm: gradients of a larger 2-norm are scaled down to it.
    """

    def __init__(self, scorer: Any, optimizer: Any, accelerator: Any, max_norm: float) -> None:
        self._scorer, self._optimizer, self._accelerator, self._max_norm = scorer, optimizer, accelerator, max_norm

    def adding(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; ranks exchange gradients with the ``last`` of an update."""
        if self._accelerator.num_processes == 1 or last:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._scorer)
        return context

    def backward(self, loss: Any) -> None:
        """Add the gradient of ``loss``; the engines average over ranks."""
        self._accelerator.backward(loss)

    def step(self) -> float:
        """Clip, let the optimiser step, drop the gradients. Returns their norm; where that is not finite, no step."""
        norm = float(self._accelerator.clip_grad_norm_(self._scorer.parameters(), self._max_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self.drop()
        return norm

    def drop(self) -> None:
        """Forget what was added."""
        self._optimizer.zero_grad(set_to_none=True)


def make_gradients(scorer: Any, optimizer: Any, accelerator: Any, max_norm: float) -> Gradients:
    """The one that goes with the engine of ``accelerator``; arguments as those of :class:`Gradients`."""
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from hiexp.rl.zero import ZeroGradients

        return ZeroGradients(scorer, optimizer, accelerator, max_norm)
    return Gradients(scorer, optimizer, accelerator, max_norm)
