"""A loss or gradient that is not finite: the batch is written down and its rollouts are named before the run stops."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiexp.agent.record import Rollout
from hiexp.io import atomic_write
from hiexp.rl.batch import sampled_positions

_NAMED = 5


class NonFiniteError(RuntimeError):
    """The update was given up before the optimiser's step; weights and optimiser state are those before it.

    Attributes:
        rollout_ids: rollouts with a token that is not finite; all of the batch where no token is.
        path: file with the batch, None where there is no run directory.
    """

    def __init__(self, message: str, rollout_ids: Sequence[str], path: Path | None) -> None:
        super().__init__(message)
        self.rollout_ids, self.path = list(rollout_ids), path


def non_finite(
    what: str,
    step: int,
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    tokens: Mapping[str, Any],
    values: Mapping[str, np.ndarray[Any, Any] | None],
    folder: Path | None,
) -> NonFiniteError:
    """The error to raise; writes ``folder/step_000003.json`` first.

    Args:
        what: what was not finite, with its value.
        indices: which rollouts the batch is made of.
        tokens: name -> (N,) values of their trained tokens, one rollout after the other, None where there are none.
        values: name -> (len(rollouts),) numbers such as rewards and advantages, None where there are none.
    """
    rows, end = [], 0
    for i in indices:
        begin, end = end, end + len(sampled_positions(rollouts[i]))
        columns = {name: column[begin:end].tolist() for name, column in tokens.items() if column is not None}
        numbers = {name: float(column[i]) for name, column in values.items() if column is not None}
        rows.append(_row(rollouts[i], numbers, columns))
    bad = [row["rollout_id"] for row in rows if row["non_finite"]]
    named = bad or [row["rollout_id"] for row in rows]
    path = None
    if folder is not None:
        path = folder / f"step_{step:06d}.json"
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"step": step, "what": what, "rollouts": rows}, indent=1, allow_nan=False) + "\n")
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    held = "with tokens that are not finite" if bad else "none with a token that is not finite"
    message = (
        f"step {step}: {what}; {held}: {', '.join(named[:_NAMED])}{more}. The optimiser did not step. Lower "
        f"algorithm.lr or use float32{'' if path is None else f'; the batch is in {path}'}"
    )
    return NonFiniteError(message, named, path)


def _row(rollout: Rollout, numbers: dict[str, float], columns: dict[str, list[float]]) -> dict[str, Any]:
    everything = [*numbers.values(), *(value for column in columns.values() for value in column)]
    return {
        "rollout_id": rollout.rollout_id,
        "non_finite": not all(map(math.isfinite, everything)),
        **{name: _plain(number) for name, number in numbers.items()},
        "token_ids": rollout.token_ids,
        "trained_positions": sampled_positions(rollout),
        **{name: [_plain(value) for value in column] for name, column in columns.items()},
    }


def _plain(value: float) -> float | str:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else str(value)
