"""Argument checks shared by the numeric operations: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor, without importing torch for callers that never did."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def describe(value: Any) -> str:
    """What came, for an error message: ``float32 of shape (3, 4)`` or the type's name."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_number(name: str, value: Any, minimum: float, *, exclusive: bool = False) -> float:
    """A finite real number at or above ``minimum`` (above it with ``exclusive``)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    bound = f"{'> ' if exclusive else '>= '}{minimum:g}"
    if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
        raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}")
    return float(value)


def check_shape(name: str, value: Any, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} ({meaning}), got {tuple(value.shape)}")


def check_offsets(name: str, value: Any, entries: int | None, total: int | None) -> None:
    """Cumulative lengths of a packed batch: integers that start at 0 and never fall (numpy or torch).

    Args:
        entries: the number of offsets that must come (sequences + 1), None where any number from 1 on will do.
        total: what the last offset must be, None where it defines the number of tokens itself.
    """
    if value.ndim != 1 or "int" not in str(value.dtype):
        raise TypeError(f"{name}: expected a 1-D integer array of cumulative lengths, got {describe(value)}")
    if value.shape[0] < 1 or (entries is not None and value.shape[0] != entries):
        raise ValueError(f"{name}: expected {entries or 'at least 1'} offsets (sequences + 1), got {value.shape[0]}")
    offsets = value.tolist()
    for position, (before, after) in enumerate(pairwise(offsets), start=1):
        if after < before:
            raise ValueError(f"{name}[{position}]: expected an offset >= {before}, got {after}")
    if offsets[0] != 0 or (total is not None and offsets[-1] != total):
        last = "" if total is None else f" and end at the number of tokens, {total}"
        raise ValueError(f"{name}: expected offsets that start at 0{last}, got {offsets[0]} .. {offsets[-1]}")
