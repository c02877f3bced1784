"""Picture of a hierarchy: the tree of lessons (E1) cut into patterns (E2), their tree cut into strategies (E3).

Only merges below a level's threshold are drawn, which are the ones that made the level above. The trees are computed
anew from the HEK's entries; where several clusters came to the same pattern, it has several roots.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.experience.abstract import Embed, level_vectors
from hiexp.io import atomic_write
from hiexp.ops.clustering import linkage
from hiexp.report.figures import START_COLOR, arm_color

if TYPE_CHECKING:
    from hiexp.experience.record import Experience
    from hiexp.experience.store import HEK

_ROW_INCHES = 0.165
_COLUMN = 1.45  # width of a column of titles, in units of a tree's width
_LETTERS = 62


@dataclass(frozen=True, slots=True)
class Scale:
    """Heights to places on the page: a tree is one wide, from just below its lowest merge to the cut."""

    left: float
    lowest: float
    cut: float

    def __call__(self, height: float) -> float:
        return self.left + max(0.0, (height - self.lowest) / (self.cut - self.lowest))


@dataclass(slots=True)
class Node:
    """A cluster: ``leaves`` are row numbers from top to bottom, ``y`` is set when the picture is laid out."""

    height: float
    leaves: list[int]
    children: tuple[Node, ...] = ()
    y: float = field(default=0.0)


def forest(Z: NDArray[np.float64], n: int) -> list[Node]:
    """Trees of a linkage matrix (m, 4) that was cut off at a threshold: n - m roots, in order of their first leaf."""
    nodes: dict[int, Node] = {i: Node(0.0, [i]) for i in range(n)}
    for row, (a, b, height, _) in enumerate(Z.tolist()):
        left, right = sorted((nodes.pop(int(a)), nodes.pop(int(b))), key=lambda node: -len(node.leaves))
        nodes[n + row] = Node(height, left.leaves + right.leaves, (left, right))
    return sorted(nodes.values(), key=lambda node: min(node.leaves))


def check_picture(path: str | Path) -> str:
    """The format that the suffix of ``path`` names; ValueError for any other than png, svg and pdf, or no folder."""
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"picture: expected a file ending in .png, .svg or .pdf, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"picture: no such folder: {path.parent}")
    require("matplotlib", "train", "the picture of a hierarchy")
    return path.suffix[1:]


def draw_hierarchy(hek: HEK, thresholds: Mapping[str, float], path: str | Path, *, embed: Embed = "title") -> None:
    """Write the picture of ``hek`` as PNG, SVG or PDF, by the suffix of ``path``.

    Args:
        hek: with E1 entries; levels above may be empty.
        thresholds: Ward heights for ``"E2"`` and ``"E3"``, as :class:`HierarchyReport` has them.
        embed: what was clustered, as in :func:`hiexp.build_hierarchy`.

    Raises:
        ValueError: no lesson, or a suffix that is none of the three.
    """
    kind = check_picture(path)
    lessons, patterns = list(hek.entries("E1", "active")), list(hek.entries("E2", "active"))
    if not lessons:
        raise ValueError(f"picture: expected a HEK with lessons (E1), {hek.path} has none")
    strategies = list(hek.entries("E3", "active"))
    order = forest(_tree(hek, patterns, thresholds["E3"], embed), len(patterns))
    order.sort(key=lambda node: -len(node.leaves))
    roots = _grouped(forest(_tree(hek, lessons, thresholds["E2"], embed), len(lessons)), lessons, patterns, order)
    atomic_write(path, _render(lessons, patterns, strategies, roots, order, thresholds, kind))


def _tree(hek: HEK, entries: Sequence[Experience], threshold: float, embed: Embed) -> NDArray[np.float64]:
    if len(entries) < 2:
        return np.empty((0, 4))
    Z: NDArray[np.float64] = linkage(level_vectors(hek, entries, embed)[0], "ward", threshold=threshold)
    return Z


def _grouped(
    roots: Sequence[Node], lessons: Sequence[Experience], patterns: Sequence[Experience], order: Sequence[Node]
) -> list[tuple[int | None, Node]]:
    """(pattern or None, tree of lessons) from top to bottom: patterns as their own tree has them, then the rest."""
    owner = {child: number for number, pattern in enumerate(patterns) for child in pattern.children}
    place = {number: rank for rank, number in enumerate(leaf for node in order for leaf in node.leaves)}
    found = [(owner.get(lessons[root.leaves[0]].exp_id) if root.children else None, root) for root in roots]
    return sorted(found, key=lambda item: (len(place) if item[0] is None else place[item[0]], -len(item[1].leaves)))


def _render(
    lessons: Sequence[Experience],
    patterns: Sequence[Experience],
    strategies: Sequence[Experience],
    roots: Sequence[tuple[int | None, Node]],
    order: Sequence[Node],
    thresholds: Mapping[str, float],
    kind: str,
) -> bytes:
    matplotlib = require("matplotlib", "train", "the picture of a hierarchy")
    figure_module = require("matplotlib.figure", "train", "the picture of a hierarchy")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hierarchy", "font.size": 7}):
        figure = figure_module.Figure(figsize=(17, 1.2 + _ROW_INCHES * len(lessons)), facecolor="white")
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set_axis_off()
        axes.set_xlim(-_COLUMN, 2 + 2 * _COLUMN)
        axes.set_ylim(len(lessons) + 0.5, -3)
        colors = {leaf: rank for rank, node in enumerate(order) if len(node.leaves) > 1 for leaf in node.leaves}
        centres = _draw_lessons(axes, lessons, roots, thresholds["E2"], colors)
        _draw_patterns(axes, patterns, strategies, order, centres, thresholds["E3"], colors)
        for x, text in (
            (-0.02, f"{len(lessons)} lessons (E1)"),
            (1.0, f"cut at {thresholds['E2']:.3f}"),
            (1 + _COLUMN - 0.02, f"{len(patterns)} patterns (E2)"),
            (2 + _COLUMN, f"cut at {thresholds['E3']:.3f}"),
            (2 + 2 * _COLUMN, f"{len(strategies)} strategies (E3)"),
        ):
            axes.text(x, -1.9, text, ha="right", va="bottom", fontsize=9, fontweight="bold")
        buffer = io.BytesIO()
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
        return buffer.getvalue()


def _draw_lessons(
    axes: Any,
    lessons: Sequence[Experience],
    roots: Sequence[tuple[int | None, Node]],
    threshold: float,
    colors: Mapping[int, int],
) -> dict[int, float]:
    """Titles and trees of the lessons; returns the height on the page of every pattern's cluster."""
    centres: dict[int, list[float]] = {}
    x_of = _scale(0.0, [root for _, root in roots], threshold)
    _draw_cut(axes, x_of, len(lessons) - 0.5)
    y = 0
    for pattern, root in roots:
        color = arm_color(colors[pattern]) if pattern is not None and pattern in colors else START_COLOR
        rows = {leaf: float(y + i) for i, leaf in enumerate(root.leaves)}
        for leaf, row in rows.items():
            _text(axes, -0.02, row, lessons[leaf].title, "right", "black")
        _place(root, rows)
        _draw_tree(axes, root, x_of, color)
        if pattern is not None:
            axes.plot([x_of(root.height), 1.02], [root.y, root.y], color=color, lw=0.8)
            centres.setdefault(pattern, []).append(root.y)
        y += len(root.leaves)
    return {pattern: float(np.mean(ys)) for pattern, ys in centres.items()}


def _draw_patterns(
    axes: Any,
    patterns: Sequence[Experience],
    strategies: Sequence[Experience],
    order: Sequence[Node],
    centres: Mapping[int, float],
    threshold: float,
    colors: Mapping[int, int],
) -> None:
    left = 1 + _COLUMN
    x_of = _scale(left, order, threshold)
    _draw_cut(axes, x_of, max(centres.values(), default=0.0) + 0.5)
    for number, y in centres.items():
        color = arm_color(colors[number]) if number in colors else START_COLOR
        _text(axes, 1.04, y, patterns[number].title, "left", color)
    owner = {child: strategy for strategy in strategies for child in strategy.children}
    for node in order:
        if len(node.leaves) < 2 or any(leaf not in centres for leaf in node.leaves):
            continue
        color = arm_color(colors[node.leaves[0]])
        _place(node, {leaf: centres[leaf] for leaf in node.leaves})
        _draw_tree(axes, node, x_of, color)
        axes.plot([x_of(node.height), left + 1.02], [node.y, node.y], color=color, lw=0.8)
        strategy = owner.get(patterns[node.leaves[0]].exp_id)
        if strategy is not None:
            _text(axes, left + 1.04, node.y, strategy.title, "left", color)


def _scale(left: float, roots: Sequence[Node], cut: float) -> Scale:
    merges = [height for root in roots for height in _heights(root)]
    return Scale(left, 0.95 * min(merges, default=0.0), cut)


def _heights(node: Node) -> list[float]:
    return [node.height, *(h for child in node.children for h in _heights(child))] if node.children else []


def _draw_cut(axes: Any, x_of: Scale, bottom: float) -> None:
    axes.plot([x_of.left + 1.0] * 2, [-1, bottom], color="black", lw=0.7, ls="--")
    for height in np.linspace(x_of.lowest, x_of.cut, 3):
        axes.text(x_of(height), -1.1, f"{height:.2f}", ha="center", va="bottom", fontsize=6, color="#555555")


def _place(node: Node, rows: Mapping[int, float]) -> None:
    for child in node.children:
        _place(child, rows)
    node.y = float(np.mean([child.y for child in node.children])) if node.children else rows[node.leaves[0]]


def _draw_tree(axes: Any, node: Node, x_of: Scale, color: str) -> None:
    x = x_of(node.height)
    if node.children:
        axes.plot([x, x], [node.children[0].y, node.children[1].y], color=color, lw=0.8)
    for child in node.children:
        axes.plot([x_of(child.height), x], [child.y, child.y], color=color, lw=0.8)
        _draw_tree(axes, child, x_of, color)


def _text(axes: Any, x: float, y: float, text: str, side: str, color: str) -> None:
    short = text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
    axes.text(x, y, short.replace("$", r"\$"), ha=side, va="center", color=color)
