"""Weights and optimiser state of sharded models (FSDP2) as whole tensors, and back.

Whole means: as one process would hold them. Parameters keep their order under FSDP2, so the optimiser's own numbering
is that of one process too, and a checkpoint goes from any number of processes to any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Any) -> Any:
    """``tensor`` gathered from all ranks where it is sharded; every rank has to call this, every rank gets it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Whole ``tensor`` with the device, type and sharding of ``pattern``."""
    tensor = tensor.to(device=pattern.device, dtype=pattern.dtype)
    return (
        distribute_tensor(tensor, pattern.device_mesh, pattern.placements) if isinstance(pattern, DTensor) else tensor
    )


def whole_weights(model: Any, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of ``model`` by name, whole, one after the other; every rank has to take all."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or not trained_only:
            yield name, whole(parameter.detach())
    if not trained_only:
        yield from model.named_buffers(remove_duplicate=False)


@torch.no_grad()
def set_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy whole ``weights`` into the model's parameters and buffers of the same names."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in weights:
            tensor.copy_(placed_like(weights[name], tensor))


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimiser's state_dict with whole tensors on the CPU where they were sharded; on every rank."""

    def leaf(value: Any) -> Any:
        return whole(value).cpu() if isinstance(value, DTensor) else value

    state = optimizer.state_dict()
    moments = {number: {key: leaf(value) for key, value in entry.items()} for number, entry in state["state"].items()}
    return {**state, "state": moments}


def set_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load a state_dict of whole tensors; moments are sharded like the parameter they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def leaf(value: Any, parameter: torch.Tensor) -> Any:
        sharded = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return placed_like(value, parameter) if sharded and isinstance(parameter, DTensor) else value

    moments = {
        number: {key: leaf(value, parameters[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
