"""Scores of stored logs, ``hiexp eval --trajectories``: of each file, and of all of them together.

Stored answers are not answered again. Logs do not name the corpus that they searched; ``--corpus`` says it for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiexp.agent.eval_table import table_lines
from hiexp.agent.trajectory import Trajectory
from hiexp.experience.guard import text_key
from hiexp.experience.importers import load_trajectories
from hiexp.rl.metrics import mean
from hiexp.tasks.judge import Answered, Judge
from hiexp.tasks.question import Question
from hiexp.tasks.scorers import make_scorer
from hiexp.tasks.statistics import bootstrap_interval

_Scored = tuple[Trajectory, dict[str, float]]


def evaluate_logs(
    paths: Sequence[str], dialect: str, questions: Sequence[Question], limit: int | None, judge: Judge | None
) -> dict[str, Any]:
    """The numbers of all attempts, with those of each file under ``files``.

    Args:
        dialect: scorer, see :func:`hiexp.tasks.scorers.make_scorer`.
        questions: gold answers for logs that hold none.
        limit: the first so many questions of each file only.

    Raises:
        DataError: see :func:`hiexp.experience.importers.load_trajectories`. ValueError: a file given twice.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"--trajectories: expected different files, got {' '.join(paths)}")
    scorer = make_scorer(dialect)
    files: dict[str, list[_Scored]] = {}
    for path in paths:
        groups = load_trajectories([path], scorer=scorer, questions=questions)[:limit]
        files[path] = [(one, scorer.score(one.answer, one.golden_answers)) for group in groups for one in group]
    everything = [scored for part in files.values() for scored in part]
    if judge is not None:
        verdicts = judge([Answered(one.question, one.golden_answers, one.answer) for one, _ in everything])
        for (_, scores), verdict in zip(everything, verdicts, strict=True):
            scores["judge"] = float(bool(verdict))
    return {
        **_numbers(everything),
        "scorer_failures": getattr(scorer, "failures", 0),
        "files": {path: _numbers(part) for path, part in files.items()},
    }


def _numbers(scored: Sequence[_Scored]) -> dict[str, Any]:
    """Means over attempts, intervals over questions; an attempt's question is known by its text."""
    by_question: dict[str, list[dict[str, float]]] = {}
    for attempt, scores in scored:
        by_question.setdefault(text_key(attempt.question), []).append(scores)
    metrics = list(scored[0][1])
    return {
        **{metric: mean([scores[metric] for _, scores in scored]) for metric in metrics},
        "searches_per_answer": mean([len(attempt.queries()) for attempt, _ in scored]),
        "answered": mean([attempt.answer is not None for attempt, _ in scored]),
        "n": len(scored),
        "intervals": {
            metric: bootstrap_interval([np.mean([one[metric] for one in group]) for group in by_question.values()])
            for metric in metrics
        },
    }


def log_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What ``hiexp eval --trajectories`` prints: a table a file where there are several, then one of all."""
    files = result["files"]
    for path, numbers in files.items() if len(files) > 1 else ():
        yield f"{path}:"
        yield from table_lines({"logs": numbers})
        yield ""
    yield from table_lines({"logs" if len(files) == 1 else f"all {len(files)} files": result})
    yield f"\nscorer {result['dialect']}; corpus: {result['corpus']}; 95 % bootstrap intervals over questions"
