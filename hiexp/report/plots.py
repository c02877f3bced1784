"""Which pictures the report shows, and the comparison picture of the README.

``CURVES`` is the table of per-step metrics; a metric no run recorded makes no picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.io import atomic_write
from hiexp.report.comparison import arm_row, interval, primary_metric, starting_rows
from hiexp.report.figures import START_COLOR, Picture, arm_color, svg_axes
from hiexp.report.runs import Array, Run, load_runs
from hiexp.report.times import time_pictures
from hiexp.report.verdict import metric_name

_SIZE = (4.4, 2.5)  # inches
_LINE_STYLES = ("-", "--", ":")


@dataclass(frozen=True, slots=True)
class Curve:
    """A picture of one or more metrics against the step; further metrics are dashed, then dotted.

    ``paired``: only worth showing where one run has all of them.
    """

    title: str
    note: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()
    paired: bool = False


CURVES = (
    Curve("Reward", "Mean outcome reward of the step's rollouts.", ("reward_mean",)),
    Curve(
        "Reward with and without experience",
        "Rollouts of one group that were shown experience, and its controls.",
        ("reward_with_experience", "reward_without_experience"),
        ("with", "without"),
        paired=True,
    ),
    Curve(
        "Uplift of experience",
        "Reward with experience minus reward without, mean over groups with both, and its standard error.",
        ("uplift", "uplift_stderr"),
        ("uplift", "standard error"),
    ),
    Curve(
        "Advantage variance",
        "Mean squared deviation from the group mean, before normalisation.",
        ("advantage_var_raw",),
    ),
    Curve("Zero-variance groups", "Share of groups whose rollouts all got the same reward.", ("zero_variance_share",)),
    Curve("Gradient norm", "Before clipping.", ("grad_norm",)),
    Curve("KL to the starting model", "Estimate per trained token.", ("kl_ref",)),
    Curve("Clip fraction", "Share of trained tokens whose ratio was clipped, in all, from below and from above.",
          ("clip_fraction", "clip_fraction_low", "clip_fraction_high"), ("all", "below", "above")),
    Curve("Engine/trainer mismatch", "|log-prob of the trainer - of the engine| per trained token, in nats.",
          ("engine_mismatch", "engine_mismatch_max"), ("mean", "largest")),
    Curve("Entropy", "Of the policy, mean over trained tokens, in nats.", ("entropy",)),
    Curve("Searches per answer", "Tool calls per rollout.", ("searches_per_answer",)),
    Curve("Response length", "Sampled tokens per rollout.", ("response_tokens", "response_tokens_max"),
          ("mean", "longest")),
    Curve(
        "Experience shown",
        "Share of rollouts that got E2/E3 at the start, and of their tool calls that brought an E1.",
        ("experience_hit_rate_start", "experience_hit_rate_E1"),
        ("start", "E1"),
    ),
    Curve("Malformed or cut off", "Share of rollouts that broke the grammar, or ran out of tokens.",
          ("finish_malformed", "finish_max_tokens"), ("malformed", "out of tokens")),
    Curve("Peak memory", "MiB; of the host since the process began, of the GPU within the step.",
          ("peak_rss_mb", "peak_cuda_mb"), ("host", "GPU")),
    Curve("HEK size", "Active entries per level.", ("hek_E1", "hek_E2", "hek_E3"), ("E1", "E2", "E3")),
)  # fmt: skip


def curve_pictures(runs: Sequence[Run]) -> list[Picture]:
    """The pictures of :data:`CURVES` for which at least one run has numbers, and the time by part."""
    return [*(_curve(curve, runs) for curve in CURVES if _recorded(curve, runs)), *time_pictures(runs)]


def _recorded(curve: Curve, runs: Sequence[Run]) -> bool:
    enough = all if curve.paired else any
    return any(enough(len(run.series(key)[0]) for key in curve.keys) for run in runs)


def _curve(curve: Curve, runs: Sequence[Run]) -> Picture:
    out: list[str] = []
    with svg_axes(*_SIZE, out, name=curve.title) as axes:
        for index, run in enumerate(runs):
            for style, key in zip(_LINE_STYLES, curve.keys, strict=False):
                _draw_line(axes, *run.series(key), color=arm_color(index), style=style)
        _scale(axes, np.concatenate([run.series(key)[1] for run in runs for key in curve.keys]))
        _finish(axes, curve.labels)
    return Picture(curve.title, curve.note, out[0])


def _scale(axes: Any, values: Array) -> None:
    """Logarithmic where values span decades; from zero where they hardly differ: noise must not look like news."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
    elif low >= 0 and low > 0.75 * high:
        axes.set_ylim(0, 1.25 * high)
    elif low == high == 0:
        axes.set_ylim(-0.02, 1)


def _draw_line(axes: Any, steps: Array, values: Array, *, color: str, style: str = "-") -> None:
    """Raw values thin, their running mean bold; short series bold only."""
    if len(values) >= 20:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, smoothed(values), color=color, linewidth=1.8, linestyle=style, marker=marker, markersize=4)


def smoothed(values: Array) -> Array:
    """Centred running mean over a tenth of the series, at most 25 steps; ends average what is there."""
    width = min(25, len(values) // 10)
    if width < 2:
        return values
    window = np.ones(width)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def _finish(axes: Any, labels: Sequence[str]) -> None:
    """A legend of line styles (colours are the page's legend), the step axis, and sober margins."""
    for style, label in zip(_LINE_STYLES, labels, strict=False):
        axes.plot([], [], color="#808080", linestyle=style, linewidth=1.5, label=label)
    if labels:
        axes.legend(loc="best", ncols=len(labels), handlelength=1.8)
    axes.margins(x=0.02)
    axes.tick_params(length=2.5, width=0.6)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def evaluation_pictures(runs: Sequence[Run]) -> list[Picture]:
    """One picture for each test metric: score against step, without the HEK solid, with it dashed."""
    present = {
        key for run in runs for e in run.evaluations for scores in (e.without_hek, e.with_hek) for key in scores or ()
    }
    return [
        _evaluation_curve(metric, runs)
        for metric in ("em", "accuracy", "f1", "cem", "searches_per_answer")
        if metric in present
    ]


def _evaluation_curve(metric: str, runs: Sequence[Run]) -> Picture:
    out: list[str] = []
    drawn: list[float] = []
    with svg_axes(*_SIZE, out, name=f"test {metric}") as axes:
        for index, run in enumerate(runs):
            for style, attribute in zip(_LINE_STYLES, ("without_hek", "with_hek"), strict=False):
                scores = [(e.step, getattr(e, attribute)) for e in run.evaluations]
                points = [(step, score[metric]) for step, score in scores if score is not None and metric in score]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=arm_color(index), linestyle=style, linewidth=1.6, marker="o", markersize=4,
                    )  # fmt: skip
                    drawn.extend(score for _, score in points)
        _scale(axes, np.array(drawn))
        _finish(axes, ("without HEK", "with HEK"))
    title = "Searches per answer (test)" if metric == "searches_per_answer" else f"Test {metric_name(metric)}"
    return Picture(title, "Evaluation, without the HEK and with it.", out[0])


def comparison_png(run_dirs: Sequence[str | Path], out: str | Path) -> None:
    """The README's picture: reward curves of the arms, and bars of test scores without and with the HEK.

    Bars carry 95% Wilson intervals where the number of test questions is known.

    Raises:
        DataError, ValueError: see :func:`hiexp.report.runs.load_runs`.
    """
    runs = load_runs(run_dirs)
    matplotlib = require("matplotlib", "train", "the comparison picture")
    figure_module = require("matplotlib.figure", "train", "the comparison picture")
    require("matplotlib.backends.backend_agg", "train", "the comparison picture")
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
        for index, run in enumerate(runs):
            _draw_line(left, *run.series("reward_mean"), color=arm_color(index))
            left.plot([], [], color=arm_color(index), linewidth=1.8, label=run.name)
        left.set(title="Training reward", xlabel="step", ylabel="mean reward of a step")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(frameon=False, loc="best")
        left.grid(alpha=0.2)
        _draw_bars(right, runs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    atomic_write(out, buffer.getvalue())


def _draw_bars(axes: Any, runs: Sequence[Run]) -> None:
    metric = primary_metric(runs)
    starts = starting_rows(runs)
    rows = [*starts, *(arm_row(run, None) for run in runs)]
    colors = [START_COLOR] * len(starts) + [arm_color(index) for index in range(len(runs))]
    for index, (row, color) in enumerate(zip(rows, colors, strict=True)):
        _draw_bar(axes, index - 0.2, row.without_hek, metric, color=color)
        _draw_bar(axes, index + 0.2, row.with_hek, metric, color=color, hatch="///")
    axes.set_xticks(range(len(rows)), [row.name.replace(" (", "\n(") for row in rows])
    axes.set(title=f"Test {metric_name(metric)}: plain without HEK, hatched with it", ylim=(0, 1.12))
    axes.grid(axis="y", alpha=0.2)


def _draw_bar(
    axes: Any, x: float, scores: dict[str, float] | None, metric: str, *, color: str, hatch: str | None = None
) -> None:
    if scores is None or metric not in scores:
        return
    score, n = scores[metric], scores.get("n", 0)
    top = score
    axes.bar(x, score, width=0.38, color=color, alpha=0.55 if hatch else 1.0, hatch=hatch, edgecolor="white")
    if n > 0 and 0 <= score <= 1:
        low, top = interval(score, n)
        axes.plot([x, x], [low, top], color="#333333", linewidth=1.0)
    axes.text(x, top + 0.01, f"{score:.2f}", ha="center", va="bottom", fontsize=9, color="#222222")
