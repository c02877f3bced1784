"""Reads run directories for the report; whatever a killed run left is usable, whatever is damaged is named."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.agent.record import Rollout
from hiexp.io import DataError, read_jsonl
from hiexp.rl.alarms import read_alarms

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean scores at one step: ``without_hek`` and ``with_hek``, each None where it was not measured."""

    step: int
    without_hek: dict[str, float] | None
    with_hek: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory.

    Attributes:
        name: what the report calls it (the directory's name, made unique).
        path: where it is.
        config: the resolved config, empty where there is none.
        rows: metrics, one dict a step, by step.
        evaluations: by step.
        rollout_files: by step.
        notes: what was missing or cut short, for the reader of the page.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    rollout_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[Array, Array]:
        """``(steps, values)`` of one metric, each (n,) float64; steps without a finite number are left out."""
        points = [(row["step"], row[key]) for row in self.rows if _is_number(row.get(key))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    def shows_experience(self) -> bool | None:
        """Whether rollouts of this run were given experience, by its metrics; None before the first step."""
        if not self.rows:
            return None
        return len(self.series("reward_with_experience")[0]) > 0

    def has_controls(self) -> bool:
        """Whether some rollouts were given none."""
        return len(self.series("reward_without_experience")[0]) > 0


def load_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Read run directories in the order given.

    Raises:
        DataError: a directory is missing or holds no run; a damaged file (file and line named).
        ValueError: no directory, or one twice.
    """
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise ValueError("runs: expected at least one run directory, got none")
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise ValueError(f"runs: {path} was given twice")
    return [_load_run(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    """Shortest path endings that tell the runs apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _load_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    metrics, config = path / "metrics.jsonl", path / "config.resolved.yaml"
    if not metrics.is_file() and not config.is_file():
        raise DataError(f"{path}: not a run directory, it holds neither {metrics.name} nor {config.name}")
    rows = _rows(metrics)
    run = Run(
        name, path, _config(config), rows, _evaluations(path / "eval"),
        sorted((path / "rollouts").glob("step_*.jsonl.gz"), key=_step_of),
    )  # fmt: skip
    planned = run.config.get("run", {}).get("steps")
    done = int(rows[-1]["step"]) if rows else 0
    if isinstance(planned, int) and done < planned:
        run.notes.append(f"{done} of {planned} training steps are recorded: still running, or stopped early")
    run.notes.extend(f"alarm at step {alarm.step}: {alarm.message}" for alarm in read_alarms(path))
    if not run.evaluations:
        run.notes.append("no evaluation is recorded")
    return run


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    for line, row in read_jsonl(path, required=["step"], torn_tail=True):
        if not _is_number(row["step"]):
            raise DataError(f"{path}:{line}: expected a number in 'step', got {row['step']!r}")
        # A step written twice (resume after a kill): the later line is the one training went on from.
        rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    yaml = require("yaml", "train", "reading config.resolved.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a mapping, got {type(config).__name__}")
    return config


def _evaluations(folder: Path) -> list[Evaluation]:
    return [_evaluation(path) for path in sorted(folder.glob("step_*.json"), key=_step_of)]


def _evaluation(path: Path) -> Evaluation:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return Evaluation(_step_of(path), _scores(path, data, "without_hek"), _scores(path, data, "with_hek"))


def _scores(path: Path, data: dict[str, Any], key: str) -> dict[str, float] | None:
    scores = data.get(key)
    if scores is None:
        return None
    if not isinstance(scores, dict):
        raise DataError(f"{path}: expected an object or null in {key!r}, got {type(scores).__name__}")
    return {name: float(value) for name, value in scores.items() if _is_number(value)}


def load_rollouts(path: Path) -> list[Rollout]:
    """Rollouts of one step.

    Raises:
        DataError: damaged file or a row that is no rollout; file and line named.
    """
    rollouts = []
    for line, row in read_jsonl(path):
        try:
            rollouts.append(Rollout.from_json(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{line}: not a rollout record: {error!r}") from error
    return rollouts


def _step_of(path: Path) -> int:
    match = re.match(r"step_(\d+)\.", path.name)
    if match is None:
        raise DataError(f"{path}: expected a name like step_000012{''.join(path.suffixes)}")
    return int(match[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))
