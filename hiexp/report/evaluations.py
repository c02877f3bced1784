"""The report's section on ``hiexp eval``: results of one or more evaluations, as pictures and tables.

A source is the folder of ``--out`` (its result.json) or the file of ``--json``; scores of stored logs are shown too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiexp.agent.arms import ARMS
from hiexp.agent.eval_store import RESULT
from hiexp.agent.eval_table import EVENTS, statement
from hiexp.io import DataError
from hiexp.report.figures import Picture, arm_color, svg_axes
from hiexp.report.markup import esc, number

# Columns of the tables, where a result has them; pass@k columns follow the score they belong to.
_SCORES = ("em", "f1", "cem", "accuracy", "judge", "main")
_COSTS = ("answered", "searches_per_answer", "failed_searches", "sampled_tokens", "tokens", "seconds", "n")
_TITLES = {
    "em": "EM", "f1": "F1", "cem": "CEM", "accuracy": "accuracy", "judge": "judge", "main": "main metric",
    "searches_per_answer": "searches", "failed_searches": "failed<br>searches", "sampled_tokens": "sampled<br>tokens",
    "seconds": "seconds", "tokens": "all<br>tokens", "n": "answers",
    **{key: key.replace("_", "<br>") for key in EVENTS},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation: its name on the page and the JSON object that ``hiexp eval`` wrote."""

    name: str
    data: Mapping[str, Any]

    @property
    def is_logs(self) -> bool:
        """Whether it scores stored trajectories: then ``data`` is the one row of numbers itself."""
        return "trajectories" in self.data


# Title of a group of rows (a data set) -> label of a row (an arm) -> its numbers.
_Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]


def is_evaluation(path: str | Path) -> bool:
    """Whether ``path`` is a result file, or a folder that holds one."""
    path = Path(path)
    return path.suffix == ".json" or (path / RESULT).is_file()


def load_evaluations(paths: Sequence[str | Path]) -> list[EvalResult]:
    """Read results in the order given.

    Raises:
        DataError: missing or damaged file, or JSON that is no result of ``hiexp eval``.
    """
    results: list[EvalResult] = []
    for path in map(Path, paths):
        file = path / RESULT if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{file}: no such file") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not valid JSON: {error}") from error
        needed = (
            {"dialect", "intervals"} if isinstance(data, dict) and "trajectories" in data else {"sets", "arms", "macro"}
        )
        if not isinstance(data, dict) or not needed <= data.keys():
            raise DataError(f"{file}: expected a result of hiexp eval with the keys {', '.join(sorted(needed))}")
        results.append(EvalResult(_free_name(path, [one.name for one in results]), data))
    return results


def _free_name(path: Path, taken: Sequence[str]) -> str:
    name = path.resolve().name.removesuffix(".json")
    return name if name not in taken else f"{name} ({len(taken) + 1})"


def evaluations_html(results: Sequence[EvalResult]) -> str:
    """Pictures of every data set over all evaluations, then the tables of each evaluation."""
    pictures = "".join(
        f"<figure class='card'><figcaption><b>{esc(each.title)}</b>{esc(each.note)}</figcaption>{each.svg}</figure>"
        for each in _pictures(results)
    )
    sections = "".join(_section_html(result, index) for index, result in enumerate(results))
    return f"<h2 id='evaluations'>Evaluations</h2><div class='grid'>{pictures}</div>{sections}"


def _section_html(result: EvalResult, index: int) -> str:
    swatch = f"<span class='swatch' style='background:{arm_color(index)}'></span>"
    if result.is_logs:
        told = f"stored trajectories {', '.join(result.data['trajectories'])}; scorer {result.data['dialect']}"
        told += f"; corpus: {result.data['corpus']}" if "corpus" in result.data else ""
        files = result.data.get("files", {})
        rows = {**(files if len(files) > 1 else {}), "logs": result.data}
        body = _table_html(f"eval-{index}", {"stored trajectories": rows})
    else:
        told = statement(result.data)
        body = _table_html(f"eval-{index}", _groups(result.data)) + _differences_html(index, result.data)
    return f"<h3>{swatch}{esc(result.name)}</h3><p class='note'>{esc(told)}</p>{body}"


def _groups(data: Mapping[str, Any]) -> _Groups:
    groups = {
        f"{name} ({part['n_questions']} questions, scorer {part['scorer']})": {
            ARMS[arm].title: part[arm] for arm in data["arms"]
        }
        for name, part in data["sets"].items()
    }
    if data["macro"] is not None:
        groups[_mean_name(data)] = {ARMS[arm].title: data["macro"][arm] for arm in data["arms"]}
    return groups


def _mean_name(data: Mapping[str, Any]) -> str:
    return f"mean of {len(data['sets'])} sets"


def _table_html(identifier: str, groups: _Groups) -> str:
    rows = [scores for group in groups.values() for scores in group.values()]
    present = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    passes = sorted((key for key in present if "_pass@" in key), key=lambda key: int(key.rpartition("@")[2]))
    columns = [
        key
        for score in _SCORES
        for key in (score, *(each for each in passes if each.startswith(f"{score}_pass@")))
        if key in present
    ] + [key for key in _COSTS if key in present]
    columns += [key for key in EVENTS if any(row.get(key) for row in rows)]
    cells = {
        title: {label: [_cell(scores, key) for key in columns] for label, scores in group.items()}
        for title, group in groups.items()
    }
    return _grouped_table(identifier, "arm", [_title(key) for key in columns], cells)


def _grouped_table(
    identifier: str, corner: str, head: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[str]]]
) -> str:
    """A card with a table; ``head`` and the cells are HTML already, titles and labels are not."""
    lines = "".join(
        f"<tr class='group'><th colspan='{len(head) + 1}' scope='rowgroup'>{esc(title)}</th></tr>"
        + "".join(
            f"<tr><td>{esc(label)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            for label, cells in group.items()
        )
        for title, group in groups.items()
    )
    return (
        f"<div class='card scroll'><table class='dense' id='{identifier}'><thead><tr><th>{corner}</th>"
        f"{''.join(f'<th>{each}</th>' for each in head)}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _title(key: str) -> str:
    score, _, k = key.partition("_pass@")
    return f"{_TITLES[score]}<br>pass@{esc(k)}" if k else _TITLES.get(key, esc(key))


def _cell(scores: Mapping[str, Any], key: str) -> str:
    value, interval = scores.get(key), scores.get("intervals", {}).get(key)
    if interval is not None:
        return f"{number(value, 3)}<br><small>{number(interval[0], 3)}–{number(interval[1], 3)}</small>"
    if value is None or isinstance(value, int):
        return "–" if value is None else f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else number(value)


def _differences_html(index: int, data: Mapping[str, Any]) -> str:
    parts = {**data["sets"], **({_mean_name(data): data["macro"]} if data["macro"] is not None else {})}
    parts = {name: part["differences"] for name, part in parts.items() if part["differences"]}
    columns = [key for key in _SCORES if any(key in scores for part in parts.values() for scores in part.values())]
    if not columns:
        return ""
    cells = {
        name: {
            f"{ARMS[arm].title} − {ARMS[ARMS[arm].against].title}": [_difference(scores.get(key)) for key in columns]
            for arm, scores in part.items()
        }
        for name, part in parts.items()
    }
    head = [_TITLES[key] for key in columns]
    return _grouped_table(f"eval-{index}-differences", "difference, paired by question", head, cells)


def _difference(values: Sequence[float] | None) -> str:
    if values is None:
        return "–"
    mean, low, high = values
    return f"{mean:+.3f}<br><small>{low:+.3f} to {high:+.3f}</small>".replace("-", "−")


def _pictures(results: Sequence[EvalResult]) -> list[Picture]:
    """Scores with their intervals, one picture for each data set and one for the mean, a line for each arm."""
    lines: dict[tuple[str, str], list[tuple[str, int, Mapping[str, Any]]]] = {}
    several = len(results) > 1
    for index, result in enumerate(results):
        if result.is_logs:
            metric = next((key for key in ("cem", "em", "accuracy") if key in result.data), None)
            if metric is not None:
                lines.setdefault(("stored trajectories", metric), []).append((result.name, index, result.data))
            continue
        parts = [(name, part["metric"], part) for name, part in result.data["sets"].items()]
        macro = result.data["macro"]
        if macro is not None:
            metric = "main" if any("main" in macro[arm] for arm in result.data["arms"]) else parts[0][1]
            parts.append((_mean_name(result.data), metric, macro))
        for name, metric, part in parts:
            for arm in result.data["arms"]:
                label = f"{result.name}: {ARMS[arm].title}" if several else ARMS[arm].title
                lines.setdefault((name, metric), []).append((label, index, part[arm]))
    return [_picture(name, metric, rows) for (name, metric), rows in lines.items()]


def _picture(name: str, metric: str, rows: Sequence[tuple[str, int, Mapping[str, Any]]]) -> Picture:
    out: list[str] = []
    rows = [row for row in rows if row[2].get(metric) is not None]
    # About 0.075 inches a letter; longer names are cut by the picture's edge.
    left = min(0.25 + 0.075 * max((len(label) for label, *_ in rows), default=0), 2.4)
    with svg_axes(4.4, 0.75 + 0.32 * len(rows), out, name=f"{name} {metric}", left=left, top=0.1) as axes:
        for place, (_, index, scores) in enumerate(rows):
            low, high = scores["intervals"][metric]
            axes.plot([low, high], [place, place], color=arm_color(index), linewidth=2.2, alpha=0.6)
            axes.plot([scores[metric]], [place], color=arm_color(index), marker="o", markersize=5.5)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.06)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=2.5, width=0.6)
        axes.set_xlabel(_TITLES[metric])
    return Picture(name, f"{_TITLES[metric]} with its 95 % interval.", out[0])
