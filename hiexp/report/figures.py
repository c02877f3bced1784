"""Matplotlib figures as inline SVG that follows the page's colours, and the palette that all pictures share.

Text and axes are drawn in a marker colour that becomes ``currentColor`` afterwards, so one picture serves light and
dark pages. Text stays text (no glyph outlines): small files, searchable, in the reader's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hiexp._extras import require

# Mid-tones that keep a contrast of at least 3:1 on white and on near-black.
ARM_COLORS = ("#64748b", "#2f7ee6", "#d9730d", "#12966b", "#a854d6", "#d6456b", "#8a7a14", "#0891a5")
START_COLOR = "#9a9a9a"
# A colour nothing else uses; replaced by currentColor.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the page."""

    title: str
    note: str
    svg: str


def arm_color(index: int) -> str:
    """Colour of the arm at ``index``; repeats after eight."""
    return ARM_COLORS[index % len(ARM_COLORS)]


@contextmanager
def svg_axes(
    width: float, height: float, out: list[str], *, name: str, left: float = 0.55, top: float = 0.08
) -> Iterator[Any]:
    """One set of axes of ``width`` x ``height`` inches; on leaving, its SVG text is appended to ``out``.

    Margins are fixed (``left`` and ``top`` in inches), so that the axes of neighbouring pictures line up.
    ``name`` differs between the pictures of a page: the ids inside the SVG come from it.
    """
    matplotlib = require("matplotlib", "train", "the report's pictures")
    figure_module = require("matplotlib.figure", "train", "the report's pictures")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = figure_module.Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, 0.42 / height, 1 - (left + 0.08) / width, 1 - (top + 0.42) / height))
        yield axes
        out.append(_inline_svg(figure))


def _inline_svg(figure: Any) -> str:
    buffer = io.StringIO()
    # Without date and creator equal content gives equal bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1 class="plot" aria-hidden="true"', text, count=1)
    return text.replace(_INK, "currentColor")
