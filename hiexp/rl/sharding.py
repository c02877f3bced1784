"""Weights and optimiser state of a trained model as whole tensors, and back, also where they are sharded (FSDP2).

Whole means: as one process would hold them. Parameters keep their order under FSDP2, so the optimiser's own numbering
is that of one process too, and a checkpoint goes from any number of processes to any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


class Shards:
    """What this process holds of ``model`` and ``optimizer``. :class:`hiexp.rl.zero.ZeroShards` is DeepSpeed's.

    Every rank has to call each method, because ranks may have to meet in it.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers by name, whole, one after the other; every rank has to take all."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad or not trained_only:
                yield name, self._whole(parameter)
        if not trained_only:
            yield from self._model.named_buffers(remove_duplicate=False)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy whole ``weights`` into the parameters and buffers of the same names."""
        for name, buffer in self._model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for name, parameter in self._model.named_parameters():
            if name in weights:
                self._set(parameter, weights[name])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state_dict with whole tensors, on the CPU where they were sharded."""

        def leaf(value: Any) -> Any:
            return _gathered(value).cpu() if isinstance(value, DTensor) else value

        state = self._optimizer.state_dict()
        moments = {number: {key: leaf(value) for key, value in row.items()} for number, row in state["state"].items()}
        return {**state, "state": moments}

    def set_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load a state_dict of whole tensors; moments are sharded like the parameter they belong to."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

        def leaf(value: Any, parameter: torch.Tensor) -> Any:
            sharded = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            return _placed_like(value, parameter) if sharded and isinstance(parameter, DTensor) else value

        moments = {
            number: {key: leaf(value, parameters[number]) for key, value in row.items()}
            for number, row in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": moments})

    def _whole(self, parameter: Any) -> torch.Tensor:
        return _gathered(parameter.detach())

    def _set(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.copy_(_placed_like(value, parameter))


def _gathered(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed_like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Whole ``tensor`` with the device, type and sharding of ``pattern``."""
    tensor = tensor.to(device=pattern.device, dtype=pattern.dtype)
    return (
        distribute_tensor(tensor, pattern.device_mesh, pattern.placements) if isinstance(pattern, DTensor) else tensor
    )
