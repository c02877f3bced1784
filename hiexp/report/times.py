"""Where the time of a training step goes, from the seconds of metrics.jsonl: the mean step, and the steps in turn.

A phase whose parts a run did not record (another engine, an older version) is one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hiexp.report.figures import Picture, svg_axes
from hiexp.report.runs import Array, Run

_WIDTH, _HEIGHT = 4.4, 2.5  # inches
_AREAS = 100  # most columns of the picture over steps
# Phase, its name where it has no parts, what is left beside its parts, and these. One hue a phase.
_PHASES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("seconds_rollout", "rollouts", "tools, agent", (("seconds_prefill", "prefill"), ("seconds_decode", "decode"))),
    ("seconds_score", "rewards", "", ()),
    ("seconds_update", "update", "rest of update", (
        ("seconds_old_logprobs", "old log-probs"), ("seconds_reference", "reference"), ("seconds_forward", "forward"),
        ("seconds_backward", "backward"), ("seconds_optimiser", "optimiser"),
    )),
)  # fmt: skip
_COLORS = {
    "rollouts": "#8f83d9", "prefill": "#4b3fa3", "decode": "#7c6bd0", "tools, agent": "#b3a8ea", "rewards": "#3aa6a0",
    "update": "#c79a2b", "old log-probs": "#7a4d0c", "reference": "#9c6414", "forward": "#d08a1f",
    "backward": "#e2ab4c", "optimiser": "#b0533b", "rest of update": "#e8cf9d", "other": "#9a9a9a",
}  # fmt: skip


def step_parts(run: Run) -> dict[str, Array]:
    """Seconds (steps,) of every part by its name, those of a step adding up to ``seconds_step``; no zero parts.

    Only steps with a total count. Clocks of threads that work side by side may exceed their phase, never the step here:
    what is left is at least 0.
    """
    rows = [row for row in run.rows if isinstance(row.get("seconds_step"), int | float)]

    def column(key: str) -> Array:
        return np.array([row.get(key) or 0.0 for row in rows], dtype=np.float64)

    parts: dict[str, Array] = {}
    left = column("seconds_step")
    for phase, whole, rest, inner in _PHASES:
        seconds = column(phase)
        left = left - seconds
        for key, label in inner:
            parts[label] = column(key)
            seconds = seconds - parts[label]
        split = any(parts[label].any() for _, label in inner)
        parts[rest if split else whole] = seconds.clip(min=0.0)
    parts["other"] = left.clip(min=0.0)
    return {label: seconds for label, seconds in parts.items() if seconds.any()}


def time_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The mean step of every run that recorded seconds; of a single run also its steps in turn."""
    timed = [(run, parts) for run in runs if (parts := step_parts(run))]
    if not timed:
        return []
    pictures = [_mean_steps(timed)]
    if len(runs) == 1 and len(next(iter(timed[0][1].values()))) > 1:
        pictures.append(_over_steps(*timed[0]))
    return pictures


def _mean_steps(timed: Sequence[tuple[Run, dict[str, Array]]]) -> Picture:
    out: list[str] = []
    names = [run.name for run, _ in timed]
    labels = [label for label in _COLORS if any(label in parts for _, parts in timed)]
    lines = -(-len(labels) // 4)
    # About 0.075 inches a letter; longer names are cut by the picture's edge.
    left = min(0.2 + 0.075 * max(map(len, names)), _WIDTH / 2)
    top = 0.1 + 0.19 * lines
    with svg_axes(_WIDTH, 0.55 + top + 0.35 * len(timed), out, name="time", left=left, top=top) as axes:
        done = np.zeros(len(timed))
        for label in labels:
            means = np.array([parts[label].mean() if label in parts else 0.0 for _, parts in timed])
            axes.barh(range(len(timed)), means, left=done, color=_COLORS[label], height=0.6, label=label)
            done += means
        axes.set_yticks(range(len(timed)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        _legend(axes, left, top, 0.55 + top + 0.35 * len(timed))
    return Picture("Time per step", "Mean over all steps, by part.", out[0])


def _over_steps(run: Run, parts: dict[str, Array]) -> Picture:
    out: list[str] = []
    steps, seconds = _thinned(run.series("seconds_step")[0], np.array(list(parts.values())))
    top = 0.1 + 0.19 * -(-len(parts) // 4)
    with svg_axes(_WIDTH, _HEIGHT + top, out, name="time over steps", top=top) as axes:
        colors = [_COLORS[label] for label in parts]
        axes.stackplot(steps, seconds, colors=colors, labels=list(parts), linewidth=0)
        axes.margins(x=0.0)
        axes.tick_params(length=2.5, width=0.6)
        axes.set(xlabel="step", ylabel="seconds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes, 0.55, top, _HEIGHT + top)
    return Picture("Time over steps", "Seconds of each step, by part.", out[0])


def _thinned(steps: Array, seconds: Array) -> tuple[Array, Array]:
    """Means over equal runs of steps, at most ``_AREAS`` of them: ``seconds`` (parts, steps) and where they lie."""
    places = np.array_split(np.arange(len(steps)), min(_AREAS, len(steps)))
    return (
        np.array([steps[place].mean() for place in places]),
        np.stack([seconds[:, place].mean(axis=1) for place in places], axis=1),
    )


def _legend(axes: Any, left: float, top: float, height: float) -> None:
    """Above the axes, four names a line, over the whole width of the picture."""
    inner = _WIDTH - left - 0.08
    above = 1 + 0.05 / (height - top - 0.42)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-left / inner, above), ncols=4, handlelength=0.9, columnspacing=0.9,
        borderaxespad=0.0, handletextpad=0.4, labelspacing=0.25,
    )  # fmt: skip
