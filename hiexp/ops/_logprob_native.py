"""What follows a tile's product in ``token_logprobs`` on a CPU: csrc/scoring, the fast twin of _logprob_epilogue.py.

Also owns the logits that a forward pass leaves for its backward pass. They save the second product of the logits, a
quarter of all work, where they fit; all of them together never take more than ``KEPT_LIMIT``.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp._extras import require
from hiexp.ops._logprob_tiles import Upstream

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.token_logprobs")

# Bytes. With two tiles in work, at most 256 MB of logits are alive in a process, whatever the number of open graphs.
KEPT_LIMIT = 240 * 2**20

_lock = threading.Lock()
_kept_bytes = 0


def _core() -> Any:
    import hiexp

    return hiexp._core


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


def forward_tile(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    state: torch.Tensor,
    *,
    entropy: bool,
) -> None:
    """Merge a tile into ``state`` (4, R): m, s, a, z_y. ``logits`` stays as it is."""
    if len(logits):
        arrays = (_array(x) for x in (logits, bias, inverse_temperature, target, state))
        _core().forward_tile(*arrays, entropy, torch.get_num_threads())


def backward_tile(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    upstream: Upstream,
    out: torch.Tensor | None = None,
) -> None:
    """The gradient with respect to the bare product plus bias, in place or into ``out`` of the same strides."""
    if len(logits):
        rows = (lse, upstream.target, upstream.constant, upstream.entropy)
        out = logits if out is None else out
        arrays = (_array(x) for x in (logits, bias, inverse_temperature, target, *rows, out))
        _core().backward_tile(*arrays, torch.get_num_threads())


def kept_buffer(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for up to ``elements`` logits, as much as the limit leaves; it counts until the last tensor over it dies."""
    global _kept_bytes
    size = dtype.itemsize
    with _lock:
        granted = max(0, min(elements, (KEPT_LIMIT - _kept_bytes) // size))
        _kept_bytes += granted * size
    # The tensor's storage owns the array, so the array dies with the graph that saved the tensor.
    array = np.empty(granted, dtype=np.float64 if dtype == torch.float64 else np.float32)
    weakref.finalize(array, _release, granted * size)
    return torch.from_numpy(array)


def _release(size: int) -> None:
    global _kept_bytes
    with _lock:
        _kept_bytes -= size
