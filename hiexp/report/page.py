"""The report: runs and evaluations in, one self-contained HTML file out (no scripts, no outside resources).

``hiexp report RUN [RUN ...] --out FILE``; several runs are arms, overlaid in every picture and compared in one table.
What ``hiexp eval`` wrote (the folder of --out, the file of --json) makes a section of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hiexp.io import atomic_write
from hiexp.report.comparison import METRICS, WINDOW, Row, Scores, arm_row, default_threshold, starting_rows
from hiexp.report.evaluations import EvalResult, evaluations_html, is_evaluation, load_evaluations
from hiexp.report.figures import START_COLOR, Picture, arm_color
from hiexp.report.markup import esc, number
from hiexp.report.plots import curve_pictures, evaluation_pictures
from hiexp.report.runs import Run, load_runs
from hiexp.report.trajectories import LEGEND, trajectories_html
from hiexp.report.verdict import Verdict, judge, metric_name

# Settings worth comparing at a glance; the whole config is config.resolved.yaml.
_SETTINGS = (
    "model.path", "task.train", "task.kind", "task.scorer", "task.metric", "tool.kind", "tool.corpus", "experience.hek",
    "experience.experience_share", "rollout.dialect", "rollout.group_size", "algorithm.kind", "algorithm.lr",
    "algorithm.kl_coef", "run.steps", "run.questions_per_step", "run.seed",
)  # fmt: skip


def report(
    run_dirs: Sequence[str | Path], out: str | Path, *, threshold: float | None = None, samples: int = 6
) -> Path:
    """Write the HTML report of one or more runs and evaluations and return its path.

    Args:
        run_dirs: run directories of the trainer, finished, running or killed; results of ``hiexp eval``.
        out: the HTML file; replaced in one move.
        threshold: training reward for "steps to the threshold"; by default 90% of the best arm's plateau.
        samples: trajectories shown per run.

    Raises:
        DataError: no run there, or a damaged file (file and line named).
        ValueError: no run, a run twice, ``samples`` < 0.
        ImportError: matplotlib (always) or transformers (runs with a stored tokenizer) is missing.
    """
    if samples < 0:
        raise ValueError(f"samples: expected 0 or more, got {samples}")
    out = Path(out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out: the folder of {out} does not exist")
    evaluations = load_evaluations([path for path in run_dirs if is_evaluation(path)])
    training = [path for path in run_dirs if not is_evaluation(path)]
    runs = load_runs(training) if training or not evaluations else []
    atomic_write(out, _page(runs, evaluations, threshold, samples))
    return out


def _page(runs: Sequence[Run], evaluations: Sequence[EvalResult], threshold: float | None, samples: int) -> str:
    names = ", ".join([*(run.name for run in runs), *(one.name for one in evaluations)])
    style = resources.files("hiexp.report").joinpath("style.css").read_text(encoding="utf-8")
    body = (
        f"<h1>hiexp report</h1><p class='note'>{esc(names)}</p>",
        _training_html(runs, threshold, samples) if runs else "",
        evaluations_html(evaluations) if evaluations else "",
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>hiexp report: {esc(names)}</title><style>\n{style}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _training_html(runs: Sequence[Run], threshold: float | None, samples: int) -> str:
    threshold = default_threshold(runs) if threshold is None else threshold
    return "".join(
        (
            _verdict_html(judge(runs, threshold)),
            _notes_html(runs),
            "<h2>Arms</h2>" + _table_html(runs, threshold),
            _pictures_html(runs),
            _trajectories_html(runs, samples) if samples else "",
            _settings_html(runs),
        )
    )


def _verdict_html(verdict: Verdict) -> str:
    headlines = "".join(
        f"<p class='headline'>{esc(headline.answer)}</p><p>{esc(headline.evidence)}</p>"
        for headline in verdict.headlines
    )
    details = "".join(f"<li>{esc(sentence)}</li>" for sentence in verdict.details)
    caveats = "".join(f"<li class='caveat'>{esc(sentence)}</li>" for sentence in verdict.caveats)
    return f"<section class='card verdict' id='verdict'>{headlines}<ul>{details}{caveats}</ul></section>"


def _notes_html(runs: Sequence[Run]) -> str:
    notes = [f"<li><b>{esc(run.name)}</b>: {esc(note)}</li>" for run in runs for note in run.notes]
    return f"<h2>Notes</h2><ul class='note'>{''.join(notes)}</ul>" if notes else ""


def _table_html(runs: Sequence[Run], threshold: float | None) -> str:
    starts = starting_rows(runs)
    rows = [*starts, *(arm_row(run, threshold) for run in runs)]
    colors = [START_COLOR] * len(starts) + [arm_color(index) for index in range(len(runs))]
    present = {key for row in rows for scores in (row.without_hek, row.with_hek) for key in scores or ()}
    metrics = [metric for metric in METRICS if metric in present and metric != "reward"]
    spans = "".join(
        f"<th colspan='{len(metrics)}' scope='colgroup'>test {label} HEK</th>"
        for label in ("without", "with")
        if metrics
    )
    goal = number(threshold)
    head = (
        f"<tr><th rowspan='2'>arm</th><th rowspan='2'>steps</th><th rowspan='2'>reward,<br>first {WINDOW} steps</th>"
        f"<th rowspan='2'>reward,<br>last {WINDOW} steps</th><th rowspan='2'>steps to<br>reward {goal}</th>"
        f"{spans}<th rowspan='2'>test<br>questions</th></tr>"
        f"<tr>{''.join(f'<th>{esc(metric_name(metric))}</th>' for metric in metrics * 2)}</tr>"
    )
    lines = "".join(_row_html(row, color, metrics) for row, color in zip(rows, colors, strict=True))
    return (
        f"<div class='card scroll'><table id='arms'><thead>{head}</thead><tbody>{lines}</tbody></table></div>"
        f"<p class='note'>Steps to the threshold: first step at which the mean over {WINDOW} steps reached it.</p>"
    )


def _row_html(row: Row, color: str, metrics: Sequence[str]) -> str:
    tested = row.without_hek or row.with_hek or {}
    steps_to = "–" if row.steps_to_threshold is None else str(row.steps_to_threshold)
    cells = [
        str(row.steps), number(row.reward_first), number(row.reward_last), steps_to if row.steps else "–",
        *_score_cells(row.without_hek, metrics), *_score_cells(row.with_hek, metrics),
        f"{tested['n']:.0f}" if "n" in tested else "–",
    ]  # fmt: skip
    name = f"<span class='swatch' style='background:{color}'></span>{esc(row.name)}"
    return f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _score_cells(scores: Scores | None, metrics: Sequence[str]) -> list[str]:
    return [number((scores or {}).get(metric)) for metric in metrics]


def _pictures_html(runs: Sequence[Run]) -> str:
    groups: list[tuple[str, list[Picture]]] = [
        ("Training", curve_pictures(runs)),
        ("Evaluation", evaluation_pictures(runs)),
    ]
    legend = "".join(
        f"<span><span class='swatch' style='background:{arm_color(index)}'></span>{esc(run.name)}</span>"
        for index, run in enumerate(runs)
    )
    return "".join(
        f"<h2>{title}</h2><p class='legend'>{legend}</p><div class='grid'>{_figures(pictures)}</div>"
        for title, pictures in groups
        if pictures
    )


def _figures(pictures: Iterable[Picture]) -> str:
    return "".join(
        f"<figure class='card'><figcaption><b>{esc(picture.title)}</b>{esc(picture.note)}</figcaption>"
        f"{picture.svg}</figure>"
        for picture in pictures
    )


def _trajectories_html(runs: Sequence[Run], samples: int) -> str:
    sections = "".join(
        f"<h3><span class='swatch' style='background:{arm_color(index)}'></span>{esc(run.name)}</h3>"
        f"{trajectories_html(run, samples)}"
        for index, run in enumerate(runs)
    )
    return f"<h2>Trajectories</h2>{LEGEND}{sections}"


def _settings_html(runs: Sequence[Run]) -> str:
    lines = []
    for key in _SETTINGS:
        values = [_setting(run.config, key) for run in runs]
        if any(value is not None for value in values):
            cells = "".join(f"<td>{'–' if value is None else esc(value)}</td>" for value in values)
            lines.append(f"<tr><td><code>{key}</code></td>{cells}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{esc(run.name)}</th>" for run in runs)
    return (
        "<h2>Settings</h2><div class='card scroll'><table id='settings'>"
        f"<thead><tr><th>setting</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _setting(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
