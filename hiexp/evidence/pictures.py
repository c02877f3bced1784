"""Two PNG pictures: learning curves with bands over seeds, and the endpoints with their intervals."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.evidence.config import UNTRAINED
from hiexp.evidence.results import BASELINE, ENDPOINTS
from hiexp.evidence.tables import Summary
from hiexp.io import atomic_write
from hiexp.report.figures import START_COLOR, arm_color

# Arms that are drawn into one set of axes, so that lines stay few enough to follow.
_PANELS: Mapping[str, Sequence[str]] = {
    "How much is shown": ("none", "half", "all", "oracle"),
    "Which levels, whose experience": ("none", "e1", "e23", "teacher"),
    "Controls": ("none", "placebo", "shuffled", "plain"),
    "Four updates a step": ("grpo4-none", "gspo4-none", "grpo4-half", "gspo4-half", "grpo4-all", "gspo4-all"),
}
_SMOOTH = 5  # steps of the moving average
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def curves_png(summary: Summary, out: str | Path) -> None:
    """Training reward by step: mean over seeds, band from the lowest to the highest seed."""
    curves = {name: seeds for name, seeds in summary["curves"].items() if seeds}
    panels = {title: [arm for arm in arms if arm in curves] for title, arms in _PANELS.items()}
    with _figure(out, (12.0, 7.2)) as figure:
        for axes, (title, arms) in zip(
            figure.subplots(2, 2, sharex=True, sharey=True).flat, panels.items(), strict=True
        ):
            for index, arm in enumerate(arms):
                _draw_curve(axes, np.array(list(curves[arm].values()), dtype=np.float64), arm, arm_color(index))
            axes.set(title=title, ylim=(0, 1.02))
            axes.grid(alpha=0.2)
            if arms:
                axes.legend(frameon=False, loc="lower right")
        figure.supxlabel("step; band: lowest to highest seed; in brackets: seeds")
        figure.supylabel(f"training reward, mean over {_SMOOTH} steps")


def _draw_curve(axes: Any, rewards: np.ndarray[Any, Any], name: str, color: str) -> None:
    """One arm; ``rewards`` (seeds, steps)."""
    window = min(_SMOOTH, rewards.shape[1])
    smooth = np.array([np.convolve(row, np.full(window, 1.0 / window), mode="valid") for row in rewards])
    steps = np.arange(window, rewards.shape[1] + 1)
    axes.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, smooth.mean(axis=0), color=color, linewidth=1.8, label=f"{name} ({len(rewards)})")


def endpoints_png(summary: Summary, out: str | Path) -> None:
    """Test EM of every arm with and without the HEK, and its paired difference to the baseline."""
    names = list(summary["arms"])
    places = np.arange(len(names))[::-1]
    with _figure(out, (12.0, 0.42 * len(names) + 1.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for index, (label, key) in enumerate(ENDPOINTS.items()):
            shift = 0.16 * (1 - 2 * index)
            color = START_COLOR if index == 0 else arm_color(1)
            for axes, values in ((left, summary["arms"]), (right, summary["differences"])):
                points = [
                    (y, values[name][key]) for y, name in zip(places, names, strict=True) if key in values.get(name, {})
                ]
                _draw_points(axes, points, shift, color, label)
        left.set(title="test EM, trained families", xlim=(0, 1.02))
        right.set(title=f"difference to {BASELINE}, same seed")
        right.set_xlim(-1.02, 1.02)
        right.axvline(0.0, color="#333333", linewidth=0.8)
        left.set_yticks(places, ["untrained" if name == UNTRAINED else name for name in names])
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.2)
        left.legend(frameon=False, loc="best")
        figure.supxlabel("dots: seeds; bars: mean and 95% interval (t over seeds)")


def _draw_points(
    axes: Any, points: Sequence[tuple[int, Mapping[str, Any]]], shift: float, color: str, label: str
) -> None:
    for y, value in points:
        if value["mean"] is None:
            continue
        axes.plot(list(value["seeds"].values()), [y + shift] * value["n"], ".", color=color, alpha=0.45, markersize=5)
        axes.plot(value["mean"], y + shift, "|", color=color, markersize=11, markeredgewidth=2)
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [y + shift] * 2, color=color, linewidth=1.6)
    axes.plot([], [], color=color, linewidth=2, label=label)


@contextmanager
def _figure(out: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written to ``out`` as PNG on leaving; equal content gives equal bytes."""
    matplotlib = require("matplotlib", "train", "the pictures of hiexp evidence")
    figure_module = require("matplotlib.figure", "train", "the pictures of hiexp evidence")
    require("matplotlib.backends.backend_agg", "train", "the pictures of hiexp evidence")
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained", facecolor="white")
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    atomic_write(out, buffer.getvalue())
