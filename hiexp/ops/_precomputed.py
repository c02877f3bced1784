"""Precomputed distances for :func:`hiexp.linkage`: a square or a condensed matrix, checked, as a condensed one.

The square matrix is read in square blocks, so that beside it only the condensed result, half its size, is held; a
condensed array that is already contiguous is used as it is.
"""

from __future__ import annotations

import math

import numpy as np

from hiexp.ops._checks import describe

# Two distances d(i, j) and d(j, i), or d(i, i) and 0, may differ by this share of the largest distance: products such
# as 1 - U @ U.T round by about the machine epsilon times a few; more is a wrong matrix.
SYMMETRY = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}
_BLOCK = 1024  # rows and columns of a block: 8 MiB in float64


def condensed_distances(name: str, distances: np.ndarray) -> tuple[np.ndarray, int]:
    """The condensed form of ``distances``, float32 or float64 and contiguous, and the number of points.

    Args:
        distances: (n, n), or (n (n - 1) / 2,) in SciPy's order: (0, 1), (0, 2), .., (1, 2), .. Never modified.

    Raises:
        ValueError: another shape, a distance that is NaN, infinite or negative, a square matrix whose diagonal is not
            zero or that is not symmetric (see ``SYMMETRY``). The first such entry is named.
        TypeError: a dtype that is not real.
    """
    if distances.dtype.kind not in "fiu" or distances.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected real distances (float32 or float64), got {describe(distances)}")
    dtype = np.dtype(np.float32 if distances.dtype in (np.float16, np.float32) else np.float64)
    if distances.ndim == 1:
        return _checked_condensed(name, distances, dtype)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or not len(distances):
        raise ValueError(
            f"{name}: expected distances of shape (n, n) with n >= 1, or (n (n - 1) / 2,), with metric='precomputed', "
            f"got {distances.shape}"
        )
    _check_square(name, distances, SYMMETRY[dtype])
    return _condense(distances, dtype), len(distances)


def _checked_condensed(name: str, distances: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    pairs = len(distances)
    n = (1 + math.isqrt(1 + 8 * pairs)) // 2
    if pairs < 1 or n * (n - 1) // 2 != pairs:
        raise ValueError(
            f"{name}: expected n (n - 1) / 2 condensed distances for some n >= 2 with metric='precomputed', got {pairs}"
        )
    step = _BLOCK * _BLOCK
    for begin in range(0, pairs, step):
        block = distances[begin : begin + step]
        if not _all_valid(block):
            position = begin + int(_invalid(block).argmax())
            i = int(n - 2 - (math.isqrt(8 * (pairs - 1 - position) + 1) - 1) // 2)
            j = position - i * (2 * n - i - 1) // 2 + i + 1
            _refuse(f"{name}[{position}], points {i} and {j}", distances[position])
    return np.ascontiguousarray(distances, dtype=dtype), n


def _check_square(name: str, distances: np.ndarray, tolerance: float) -> None:
    n = len(distances)
    largest = 0.0
    for begin in range(0, n, _BLOCK):
        rows = distances[begin : begin + _BLOCK]
        if not _all_valid(rows):
            _check_entries(name, rows, begin, tolerance)
        largest = max(largest, float(rows.max()))
    allowed = tolerance * largest
    diagonal = np.abs(np.diagonal(distances).astype(np.float64))
    if diagonal.max() > allowed:
        i = int((diagonal > allowed).argmax())
        raise ValueError(f"{name}: expected zeros on the diagonal of the distances, got {distances[i, i]} in row {i}")
    for begin in range(0, n, _BLOCK):
        for other in range(0, begin + 1, _BLOCK):
            _check_mirror(name, distances, begin, other, allowed)


def _check_entries(name: str, rows: np.ndarray, begin: int, tolerance: float) -> None:
    """Refuses the first bad entry of some rows; negative noise on the diagonal is left to its own check."""
    bad = _invalid(rows)
    own = np.arange(len(rows))
    diagonal = rows[own, begin + own]
    with np.errstate(invalid="ignore"):
        bad[own, begin + own] &= ~(np.abs(diagonal) <= tolerance * max(float(rows.max()), 0.0))
    if bad.any():
        i, j = np.unravel_index(int(bad.argmax()), bad.shape)
        _refuse(f"{name}[{begin + int(i)}, {int(j)}]", rows[i, j])


def _check_mirror(name: str, distances: np.ndarray, begin: int, other: int, allowed: float) -> None:
    block = distances[begin : begin + _BLOCK, other : other + _BLOCK]
    mirror = distances[other : other + _BLOCK, begin : begin + _BLOCK].T
    # The larger less the smaller: right for unsigned integers too.
    gap = np.maximum(block, mirror) - np.minimum(block, mirror)
    if gap.max() > allowed:
        i, j = np.unravel_index(int((gap > allowed).argmax()), gap.shape)
        row, column = begin + int(i), other + int(j)
        raise ValueError(
            f"{name}: expected symmetric distances (to {allowed:.3g}), got {distances[column, row]} at "
            f"[{column}, {row}] and {distances[row, column]} at [{row}, {column}]"
        )


def _condense(distances: np.ndarray, dtype: np.dtype) -> np.ndarray:
    n = len(distances)
    condensed = np.empty(n * (n - 1) // 2, dtype)
    end = 0
    for i in range(n - 1):
        begin, end = end, end + n - 1 - i
        condensed[begin:end] = distances[i, i + 1 :]
    return condensed


def _all_valid(values: np.ndarray) -> bool:
    # NaN passes through both and fails both comparisons.
    return bool(values.min() >= 0) and bool(values.max() < np.inf)


def _invalid(values: np.ndarray) -> np.ndarray:
    invalid: np.ndarray = ~((values >= 0) & (values < np.inf))
    return invalid


def _refuse(where: str, value: object) -> None:
    raise ValueError(f"{where}: expected a finite distance >= 0, got {value}")
