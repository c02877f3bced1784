"""``group_advantage`` with checked arguments: outputs are allocated here, native code fills them through addresses.

The only callers of the native functions, which check nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.ops._checks import is_tensor
from hiexp.ops._group_advantage_inputs import Tokens, check_notes, dtype_name

Outputs = tuple[Any, ...]  # advantages, zero_variance, mean, std, counts (N,); token advantages (total,); notes (2,)


def launch_numpy(rewards: Any, labels: Any, tokens: Tokens, options: tuple[Any, ...], *, finite: bool) -> Outputs:
    """On the CPU, numpy in and out."""

    def empty(size: int, kind: str) -> Any:
        return np.empty(size, rewards.dtype if kind == "real" else kind)

    return _run_cpu(rewards, labels, tokens, options, finite, empty)


def launch_torch(rewards: Any, labels: Any, tokens: Tokens, options: tuple[Any, ...], *, finite: bool) -> Outputs:
    """On the tensors' device, torch in and out."""
    torch = require("torch", "train", "hiexp.group_advantage")

    def empty(size: int, kind: str) -> Any:
        return rewards.new_empty(size, dtype=rewards.dtype if kind == "real" else getattr(torch, kind))

    if rewards.device.type == "cpu":
        return _run_cpu(rewards, labels, tokens, options, finite, empty)
    if rewards.is_cuda and find_spec("hiexp._cuda") is not None:
        return _run_cuda(rewards, labels, tokens, options, finite, empty)
    # Without hiexp._cuda the rewards of a GPU visit the CPU: a few kilobytes, and `hiexp doctor` says so.
    offsets, mask = (None if value is None else value.cpu() for value in (tokens.offsets, tokens.mask))
    moved = tokens._replace(offsets=offsets, mask=mask)
    outputs = launch_torch(rewards.cpu(), labels.cpu(), moved, options, finite=finite)
    return tuple(output.to(rewards.device) for output in outputs)


def _run_cpu(
    rewards: Any, labels: Any, tokens: Tokens, options: tuple[Any, ...], finite: bool, empty: Callable[..., Any]
) -> Outputs:
    from hiexp import _core

    outputs, arguments = _arguments(_core, rewards, labels, tokens, options, empty)
    if rewards.shape[0] > 0:
        launch = _core.group_advantage_f32 if rewards.dtype.itemsize == 4 else _core.group_advantage_f64
        launch(*arguments)
        check_notes(outputs[-1], rewards, tokens, finite=finite)
    return outputs


def _run_cuda(
    rewards: Any, labels: Any, tokens: Tokens, options: tuple[Any, ...], finite: bool, empty: Callable[..., Any]
) -> Outputs:
    from hiexp import _cuda

    torch = require("torch", "train", "hiexp.group_advantage")
    outputs, arguments = _arguments(_cuda, rewards, labels, tokens, options, empty)
    if rewards.shape[0] > 0:
        device = rewards.device.index
        launch = _cuda.group_advantage_f32 if rewards.dtype.itemsize == 4 else _cuda.group_advantage_f64
        size = _cuda.group_advantage_workspace_bytes(rewards.shape[0], tokens.total, device)
        workspace = empty(size, "uint8")  # torch aligns every allocation to 512 bytes on a GPU
        launch(*arguments, workspace.data_ptr(), device, torch.cuda.current_stream(device).cuda_stream)
        check_notes(outputs[-1], rewards, tokens, finite=finite)
    return outputs


def _arguments(
    native: Any, rewards: Any, labels: Any, tokens: Tokens, options: tuple[Any, ...], empty: Callable[..., Any]
) -> tuple[Outputs, tuple[Any, ...]]:
    """The outputs, and what the native function takes."""
    rows, mask = rewards.shape[0], tokens.mask
    outputs = (
        empty(rows, "real"), empty(rows, "bool"), empty(rows, "real"), empty(rows, "real"), empty(rows, "int32"),
        empty(tokens.total, "real"), empty(2, "int64"),
    )  # fmt: skip
    if rows == 0:
        outputs[-1][:] = -1
    advantages, zero_variance, mean, std, counts, spread, notes = map(_address, outputs)
    native_tokens = native.AdvantageTokens(
        _address(tokens.offsets), tokens.width, tokens.total, _address(mask),
        1 if mask is None else mask.dtype.itemsize, mask is not None and "float" in dtype_name(mask),
    )  # fmt: skip
    arguments = (
        _address(rewards), _address(labels), dtype_name(labels), rows, native_tokens,
        native.AdvantageOptions(**dict(zip(("baseline", "scale", "ddof", "eps", "singleton"), options, strict=True))),
        advantages, zero_variance, mean, std, counts, spread, notes,
    )  # fmt: skip
    return outputs, arguments


def _address(value: Any) -> int:
    if value is None:
        return 0
    return int(value.data_ptr()) if is_tensor(value) else int(value.ctypes.data)
