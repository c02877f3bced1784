"""The run directory: its layout, its lock, and what may change when a run is continued.

    config.resolved.yaml   config.changes.jsonl   inputs.json   snapshot/   tokenizer/   metrics.jsonl   tensorboard/
    trackers.json
    rollouts/step_000012.jsonl.gz        eval/step_000000.json            checkpoints/step_000010/

``step`` counts finished training steps: ``eval/step_000000.json`` is the starting model,
``rollouts/step_000012.jsonl.gz`` holds the rollouts of the twelfth step.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.record import Rollout
from hiexp.io import DataError, atomic_write, write_jsonl
from hiexp.rl.config import TrainConfig
from hiexp.rl.config_parse import changed_settings, describe, dump_yaml, read_yaml

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot

# These have no influence on the steps already made, so a continued run may change them.
CHANGEABLE = (
    "run.dir", "run.steps", "run.threads", "run.checkpoint_every", "run.keep_last", "run.trackers",
    "tool.cache_dir", "model.device",
)  # fmt: skip
# Another policy, or other weights to train: the checkpoints could not be loaded, or would mean nothing.
FIXED = ("model.path", "model.dtype", "model.lora_rank", "model.lora_targets", "task.kind", "rollout.dialect")
# What may have changed under its name, see inputs.py; task.train and task.evaluation are settings as well.
CONTENTS = ("model.weights",)


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Create ``path`` and keep other processes out; the lock ends with the block or with the process.

    Raises:
        ValueError: another process holds the lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process is at work in this directory") from error
        yield


def claim(file: Path, config: Any, what: str) -> None:
    """Note ``config`` in ``file``; refuse to mix two settings in one directory. ``what``: what lies there.

    Raises:
        ValueError: the file holds other settings; they are named.
    """
    lines = changed_settings(read_yaml(file, []), config) if file.exists() else []
    if lines:
        raise ValueError(
            f"{file.parent}: holds {what} with other settings ({'; '.join(lines)}); continue with those, or choose "
            "another directory with --out"
        )
    atomic_write(file, dump_yaml(config))


class RunDirectory:
    """Files of the run that ``config`` describes. Nothing is written before :meth:`locked`.

    Args:
        config: settings; where the directory holds a run already, they must be that run's but for :data:`CHANGEABLE`.
        allow_changed: keys (``stage.key``) that may differ all the same; steps made before keep what they were.

    Raises:
        ValueError: the directory holds a run with another config, the differing keys are listed; or a key of
            ``allow_changed`` that can never change, or that does not exist.
        DataError: it holds other files but no run.
    """

    def __init__(self, config: TrainConfig, allow_changed: Sequence[str] = ()) -> None:
        self.path = Path(config.run.dir)
        self._config, self._allowed = config, allow_changed
        self._changes: list[str] = []
        self._inputs: dict[str, str] = {}
        _check_allowed(config, allow_changed)
        resolved = self.path / "config.resolved.yaml"
        if resolved.exists():
            differing = changed_settings(read_yaml(resolved, []), config)
            self._changes = [line for line in differing if line.split(":")[0] not in CHANGEABLE]
            refused = [line for line in self._changes if line.split(":")[0] not in allow_changed]
            if refused:
                raise ValueError(
                    f"{self.path}: holds a run with another config ({'; '.join(refused)}); restore these values to "
                    "continue it, name the keys with --allow-changed, or choose another run.dir"
                )
        elif self.path.is_dir() and any(path.name[0] != "." for path in self.path.iterdir()):
            raise DataError(f"{self.path}: expected a run or an empty directory; it holds files but no {resolved.name}")

    def check_inputs(self, found: dict[str, str]) -> None:
        """Compare the fingerprints ``found`` with those of the first start; :meth:`locked` writes them down.

        A run of a version that wrote none has them from now on.

        Raises:
            ValueError: contents changed, and were not allowed to by name.
            DataError: the file of the first start is damaged.
        """
        path = self.path / "inputs.json"
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: expected a JSON object ({error}); delete it to accept model and questions as they are now"
            ) from error
        changed = [key for key in found if key in stored and stored[key] != found[key]]
        refused = [key for key in changed if key not in self._allowed]
        if refused:
            raise ValueError(
                f"{self.path}: holds a run that began with other contents of {', '.join(refused)}; put the old files "
                "back to continue it, give these names with --allow-changed, or choose another run.dir"
            )
        self._changes += [f"{key}: other contents" for key in changed]
        self._inputs = found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create what is missing and keep other processes out; the lock ends with the block or with the process.

        Raises:
            ValueError: another process holds the lock.
        """
        with directory_lock(self.path):
            # Before the folders: a directory with folders and no config would be taken for somebody else's.
            self._note_changes()
            atomic_write(self.path / "config.resolved.yaml", dump_yaml(self._config))
            if self._inputs:
                atomic_write(self.path / "inputs.json", json.dumps(self._inputs, indent=1) + "\n")
            for folder in ("rollouts", "eval", "checkpoints", "snapshot"):
                (self.path / folder).mkdir(exist_ok=True)
            yield

    def _note_changes(self) -> None:
        """One line per restart with allowed changes: what changed, behind how many rows of metrics.jsonl."""
        if not self._changes:
            return
        metrics, log = self.path / "metrics.jsonl", self.path / "config.changes.jsonl"
        rows = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        before = log.read_text(encoding="utf-8") if log.exists() else ""
        atomic_write(log, before + json.dumps({"steps_before": rows, "changes": self._changes}) + "\n")
        self._changes = []

    def rewind(self, step: int) -> None:
        """Forget rollouts and evaluations of steps after ``step``: they are made again."""
        for path in [*(self.path / "rollouts").iterdir(), *(self.path / "eval").iterdir()]:
            match = re.match(r"step_(\d+)\.", path.name)
            if match is not None and int(match[1]) > step:
                path.unlink()
        # What writes that were killed left behind; checkpoints clean up after themselves.
        for folder in (self.path, *(self.path / name for name in ("rollouts", "eval", "snapshot"))):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()

    def write_rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Store the scored rollouts of one step."""
        write_jsonl(self.path / "rollouts" / f"step_{step:06d}.jsonl.gz", [rollout.to_json() for rollout in rollouts])

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation at ``step`` if it was made.

        Raises:
            DataError: its file is damaged.
        """
        path = self.path / "eval" / f"step_{step:06d}.json"
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error}); delete it to evaluate again") from error
        if not isinstance(result, dict) or not {"without_hek", "with_hek"} <= result.keys():
            raise DataError(f"{path}: expected an evaluation without and with HEK; delete it to evaluate again")
        return result

    def write_evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Store the evaluation at ``step``."""
        atomic_write(self.path / "eval" / f"step_{step:06d}.json", json.dumps(result, indent=1) + "\n")

    def pinned_snapshot(self) -> Path | None:
        """File of the snapshot that the run was started with, None before the first start or without a HEK."""
        files = sorted((self.path / "snapshot").glob("*.npz"))
        return files[0] if files else None

    def pin_snapshot(self, snapshot: Snapshot) -> None:
        """Keep a copy: the HEK may grow while the run is interrupted, the run goes on with what it began with."""
        if self.pinned_snapshot() is None:
            snapshot.write(self.path / "snapshot" / f"{snapshot.id[:16]}.npz")


def _check_allowed(config: TrainConfig, keys: Sequence[str]) -> None:
    known = {key for key, _, _ in describe(type(config))} | set(CONTENTS) if keys else set()
    for key in keys:
        if key not in known:
            raise ValueError(f"--allow-changed: no setting is called {key!r}; expected STAGE.KEY, e.g. algorithm.lr")
        if key in FIXED:
            raise ValueError(f"--allow-changed: {key} cannot change within a run; choose another run.dir")
