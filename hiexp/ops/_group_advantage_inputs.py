"""Arguments of ``group_advantage`` -> contiguous arrays or tensors that the native code reads as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hiexp._extras import require
from hiexp.ops._checks import check_offsets, check_shape, describe, is_tensor

_LARGEST_BATCH = 2**31 - 1  # rows are 32-bit numbers in the hash table


class Tokens(NamedTuple):
    """Where the advantages go, token by token; ``total`` 0 and ``shape`` None for nowhere."""

    offsets: Any | None  # (N + 1,) int64
    mask: Any | None  # (total,)
    width: int  # tokens of each rollout where there are no offsets
    total: int
    shape: tuple[int, ...] | None


def dtype_name(value: Any) -> str:
    """Such as ``int32``, for numpy (in any byte order) and torch alike."""
    return str(value.dtype).removeprefix("torch.") if is_tensor(value) else str(value.dtype.name)


def as_rewards(value: Any) -> tuple[Any, bool]:
    """(N,) float32 or float64 without gradient, and whether the results are to be made float32.

    Half precision becomes float32, which loses nothing. Integers of torch are computed in float64, since float32 has
    only 24 bits for them.
    """
    value = _as_array("rewards", value)
    narrow = False
    if is_tensor(value):
        if value.is_complex():
            raise TypeError(f"rewards: expected real numbers, got {describe(value)}")
        value = value.detach()
        narrow = not value.is_floating_point()
        if narrow:
            value = value.double()
        elif value.dtype.itemsize < 4:
            value = value.float()
    else:
        if value.dtype.kind not in "fiub":
            raise TypeError(f"rewards: expected real numbers, got {describe(value)}")
        half = value.dtype.kind == "f" and value.dtype.itemsize < 4
        single = value.dtype.kind == "f" and value.dtype.itemsize == 4
        value = np.require(value, np.float32 if half or single else np.float64, ["C", "A"])
    if value.ndim != 1:
        raise ValueError(f"rewards: expected a 1-D array, one reward a rollout, got {describe(value)}")
    if value.shape[0] > _LARGEST_BATCH:
        raise ValueError(f"rewards: expected at most 2**31 - 1 rollouts, got {value.shape[0]}")
    return (value.contiguous() if is_tensor(value) else value), narrow


def as_labels(value: Any, rewards: Any) -> Any:
    """(N,) labels of the kind and on the device of ``rewards``; any integer type the native code reads."""
    empty = not hasattr(value, "dtype") and len(np.shape(value)) == 1 and len(value) == 0
    labels = _to_kind("group_ids", np.empty(0, np.int64) if empty else _as_array("group_ids", value), rewards)
    name = dtype_name(labels)
    if "int" not in name and name != "bool":
        raise TypeError(
            f"group_ids: expected integer labels, got {describe(labels)}; np.unique(names, return_inverse=True)[1] "
            "numbers names"
        )
    check_shape("group_ids", labels, (rewards.shape[0],), "one label a reward")
    if is_tensor(labels):
        # torch can hardly compute with the unsigned types above 8 bits.
        converted = labels.long() if name in ("uint16", "uint32", "uint64") else labels
        if name == "uint64" and bool((converted < 0).any()):
            raise ValueError("group_ids: expected labels below 2**63, got a larger one")
        return converted.contiguous()
    if name == "uint64" and labels.size and int(labels.max()) >= 2**63:
        raise ValueError(f"group_ids: expected labels below 2**63, got {int(labels.max())}")
    return np.require(labels, np.int64 if name == "uint64" else labels.dtype.newbyteorder("="), ["C", "A"])


def as_tokens(token_mask: Any | None, cu_seqlens: Any | None, rewards: Any) -> Tokens:
    """Mask and offsets beside the rewards; what the offsets hold is checked by the native code."""
    rows = rewards.shape[0]
    mask = None if token_mask is None else _to_kind("token_mask", _as_array("token_mask", token_mask), rewards)
    if cu_seqlens is None:
        if mask is None:
            return Tokens(None, None, 0, 0, None)
        if mask.ndim != 2 or mask.shape[0] != rows:
            expected = f"({rows}, T), one row a reward (or pass cu_seqlens)"
            raise ValueError(f"token_mask: expected shape {expected}, got {tuple(mask.shape)}")
        return Tokens(None, _contiguous(mask), mask.shape[1], rows * mask.shape[1], tuple(mask.shape))
    offsets = _to_kind("cu_seqlens", _as_array("cu_seqlens", cu_seqlens), rewards)
    if offsets.ndim != 1 or "int" not in str(offsets.dtype) or offsets.shape[0] != rows + 1 or rows == 0:
        check_offsets("cu_seqlens", offsets, rows + 1, None)
    if mask is None:
        total = int(offsets[-1])
        if total < 0:
            check_offsets("cu_seqlens", offsets, rows + 1, None)
    else:
        if mask.ndim != 1:
            check_shape("token_mask", mask, (int(offsets[-1]),), "one entry a packed token")
        total = mask.shape[0]
    offsets = offsets.long().contiguous() if is_tensor(offsets) else np.require(offsets, np.int64, ["C", "A"])
    return Tokens(offsets, None if mask is None else _contiguous(mask), 0, total, (total,))


def check_notes(notes: Any, rewards: Any, tokens: Tokens, *, finite: bool) -> None:
    """Turn what the native code took down into errors; waits for the device if there is anything to check.

    Args:
        notes: (2,) first row with an unusable reward, first bad offset; -1 for none.
        finite: whether an unusable reward is an error.
    """
    if not finite and tokens.offsets is None:
        return
    row, offset = notes.tolist()
    if offset >= 0 and tokens.offsets is not None:
        if tokens.mask is not None:
            check_shape("token_mask", tokens.mask, (int(tokens.offsets[-1]),), "one entry a packed token")
        check_offsets("cu_seqlens", tokens.offsets, None, tokens.total)
    if finite and row >= 0:
        reward = float(rewards[row])
        bound = " of at most 2**1022" if np.isfinite(reward) else ""
        raise ValueError(
            f'rewards[{row}]: expected a finite reward{bound}, got {reward}; nan="zero" leaves such rows out'
        )


def _as_array(name: str, value: Any) -> Any:
    """A tensor as it is; anything else as numpy, or as a tensor if it lives on a GPU."""
    if is_tensor(value) or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        if value.__dlpack_device__()[0] != 1:  # 1 is kDLCPU
            return require("torch", "train", "hiexp.group_advantage").from_dlpack(value)
        return np.from_dlpack(value)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name}: expected a 1-D array of numbers, got {type(value).__name__} ({error})") from error


def _to_kind(name: str, value: Any, like: Any) -> Any:
    """``value`` as an array, or as a tensor on the device of ``like``."""
    if not is_tensor(like):
        return value.detach().cpu().numpy() if is_tensor(value) else value
    if is_tensor(value):
        return value.detach().to(like.device)
    if value.dtype.kind not in "biuf":
        expected = "integer labels" if name == "group_ids" else "numbers"
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    torch = require("torch", "train", "hiexp.group_advantage")
    native = np.require(value, value.dtype.newbyteorder("="), ["C", "A", "W"])
    return torch.from_numpy(native).to(like.device)


def _contiguous(mask: Any) -> Any:
    if is_tensor(mask):
        return mask.contiguous()
    if mask.dtype.kind not in "biuf" or mask.dtype.itemsize > 8:
        raise TypeError(f"token_mask: expected numbers or bools, got {describe(mask)}")
    return np.require(mask, mask.dtype.newbyteorder("="), ["C", "A"])
