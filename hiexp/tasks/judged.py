"""How the answers of one source of questions are judged: as its name says, as its columns look, or as the config says.

``aime24=FILE`` is judged as the named set, ``maths=FILE`` and ``qa=FILE`` as their kind. Without such a label a name or
hub repository of the table speaks for itself, and so does a file named like a set of the table whose columns it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiexp.tasks.data_sets import DATA_SETS, KINDS, DataSet, Kind, find_data_set, split_label
from hiexp.tasks.qa import COLUMNS, first_row, source_name, split_sources

# By task.kind, what helps where it would judge a source wrongly.
MEND = {
    "qa": "set task.kind: maths and task.metric: accuracy, or write qa=SOURCE where it is meant so",
    "maths": "set task.kind: qa and task.metric: em, or write maths=SOURCE where it is meant so",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of one source.

    Attributes:
        source: without its label.
        name: of its table: key of the named set, else from the file or repository.
        named: its entry among the named sets.
        kind: what label or table say; None where they say nothing, and the config's ``task.kind`` holds.
        looks_like_maths: whether, without a kind, its columns are those of maths sets.
    """

    source: str
    name: str
    named: DataSet | None
    kind: Kind | None
    looks_like_maths: bool = False

    def mismatch(self, kind: str) -> str:
        """Why ``task.kind: kind`` would judge this source wrongly; empty where it would not."""
        if self.kind not in (None, kind):
            return f"{self.source}: answers of {self.name} are judged as {self.kind}, task.kind is {kind}"
        if self.looks_like_maths and kind == "qa":
            return f"{self.source}: columns of a maths set, task.kind is qa, which compares answers as text"
        return ""


def judged_sources(source: str, split: str | None) -> Iterator[tuple[Judged, int | None]]:
    """Every source of a joined one, with how many questions it is to give.

    Raises:
        DataError, ValueError, ImportError: see :func:`hiexp.tasks.qa.load_questions`.
    """
    for part, count in split_sources(source):
        yield judged_as(part, split), count


def mismatches(source: str, split: str | None, kind: str) -> list[str]:
    """Why ``task.kind: kind`` would judge answers to parts of ``source`` wrongly; empty where it would not."""
    return [problem for told, _ in judged_sources(source, split) if (problem := told.mismatch(kind))]


def judged_as(source: str, split: str | None) -> Judged:
    """How one source is judged; reads its first row where its name does not tell."""
    label, source = split_label(source)
    if label in KINDS:
        return Judged(source, source_name(source), None, label)
    found = find_data_set(label or source) if label or not Path(source).exists() else None
    found = found or next(((key, one) for key, one in DATA_SETS.items() if one.source == source), None)
    if found is None:
        row = first_row(source, split)
        found = find_data_set(source_name(source)) if Path(source).is_file() else None
        if found is None or not COLUMNS[found[1].columns].fit(row):
            return Judged(source, source_name(source), None, None, _looks_like_maths(row))
    return Judged(source, found[0], found[1], found[1].kind)


def _looks_like_maths(row: Mapping[str, Any]) -> bool:
    return COLUMNS["competition"].fit(row) or COLUMNS["olympiad"].fit(row) or "#### " in str(row.get("answer"))
