"""How sure a score is: bootstrap intervals over questions, t intervals over seeds, paired differences, pass@k.

Questions are drawn, not rollouts: several answers to one question are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiexp._extras import require

_RESAMPLES = 2000
_CELLS = 1 << 22  # indices drawn at a time: 32 MB


def bootstrap_interval(values: ArrayLike, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` (Q,), one a question (Efron 1979), from 2,000 resamples.

    Raises:
        ValueError: no values, a value that is not finite, or a level outside (0, 1).
    """
    return macro_interval([values], level=level, seed=seed)


def macro_interval(sets: Sequence[ArrayLike], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over data sets of the mean within each; every set (Q_s,) is resampled by itself.

    Raises:
        ValueError: as :func:`bootstrap_interval`, or no set.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in sets]
    if not arrays:
        raise ValueError("sets: expected at least one data set, got none")
    for array in arrays:
        if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
            raise ValueError(f"values: expected finite numbers of shape (Q,) with Q >= 1, got shape {array.shape}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(array, rng) for array in arrays], axis=0)  # (resamples,)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _resampled_means(array: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    rows = max(1, _CELLS // len(array))
    means = []
    for start in range(0, _RESAMPLES, rows):
        drawn = rng.integers(len(array), size=(min(rows, _RESAMPLES - start), len(array)))
        means.append(array[drawn].mean(axis=1))
    return np.concatenate(means)


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over the same questions, and its interval; both (Q,)."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"b: expected the shape of a, {left.shape}, got {right.shape}")
    low, high = bootstrap_interval(left - right, level=level, seed=seed)
    return float((left - right).mean()), low, high


def pass_at_k(correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Chance (Q,) that one of k answers is right, unbiased, from (Q, n) answers, n >= k (Chen et al. 2021, eq. 1)."""
    right = np.asarray(correct, dtype=bool)
    if right.ndim != 2 or not 1 <= k <= right.shape[1]:
        raise ValueError(f"k: expected 1..n for answers of shape (Q, n), got {k} for shape {right.shape}")
    n = right.shape[1]
    wrong = n - right.sum(axis=1)
    # prod over i of (wrong - i) / (n - i): the chance that all of k answers drawn without replacement are wrong
    steps = np.arange(k)
    missed = np.prod(np.clip((wrong[:, None] - steps) / (n - steps), 0.0, None), axis=1)
    solved: NDArray[np.float64] = 1.0 - missed
    return solved


def t_interval(values: ArrayLike, *, level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of a few independent values (n,), e.g. one a seed; None for fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"values: expected finite numbers of shape (n,), got shape {array.shape}")
    if len(array) < 2:
        return None
    stats = require("scipy.stats", "train", "intervals over seeds")
    half = float(stats.t.ppf((1.0 + level) / 2.0, len(array) - 1)) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)
