"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate; metrics.jsonl stays the truth.

A run keeps its identity across restarts: the id that trackers with runs of their own know it by lies in trackers.json.
TensorBoard forgets the steps that a restart makes again; other trackers decide themselves (W&B keeps the first values).
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from hiexp._extras import require
from hiexp.io import atomic_write

PROJECT = "hiexp"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse ``run.trackers`` that cannot work here, before long work starts.

    Raises:
        ValueError: accelerate does not know a name. ImportError: a tracker's package is not installed.
    """
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise ValueError(f"run.trackers: expected names among {', '.join(sorted(known))}; got {name!r}")
        if name == "tensorboard":
            require("tensorboard", "train", "run.trackers: tensorboard")
        elif importlib.util.find_spec(name) is None:
            raise ImportError(f"run.trackers: {name} is not installed; run: pip install {name}")


class Trackers:
    """The trackers ``names`` of the run in ``directory``; rank 0 alone opens them.

    Args:
        names: checked by :func:`check_trackers`.
        directory: run directory.
        config: settings, shown beside the curves where the tracker can.
        resume_step: steps after this one are made again.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any], resume_step: int) -> None:
        settings: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": directory / "tensorboard", "purge_step": resume_step + 1},
        }
        if "wandb" in names:
            settings["wandb"] = {"id": _run_id(directory), "resume": "allow", "dir": str(directory)}
        self._trackers = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if kind.requires_logging_directory:
                settings.setdefault(name, {"logging_dir": directory / name})
            self._trackers.append(kind(PROJECT, **settings.get(name, {})))
        for tracker in self._trackers:
            tracker.start()
            # TensorBoard would write another hyperparameter session at every restart.
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(dict(config))

    def publish(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """Numbers among ``values`` under ``prefix/``."""
        numbers = {
            f"{prefix}/{key}": value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Flush and end the trackers' runs."""
        for tracker in self._trackers:
            tracker.finish()


def _run_id(directory: Path) -> str:
    path = directory / "trackers.json"
    if not path.exists():
        atomic_write(path, json.dumps({"run_id": uuid.uuid4().hex[:16]}) + "\n")
    return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
