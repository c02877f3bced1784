"""Checkpoints that survive kills, full disks and bit rot.

A checkpoint is a directory ``step_000010``. It is written under a hidden temporary name, hashed into ``manifest.json``,
flushed to the disk and renamed, so a directory with the final name is whole. On load every file is checked against its
hash; a damaged checkpoint is passed over for the one before it. Kept are the last n and the best by evaluation score.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hiexp.io import DataError, atomic_write, fsync_directory, fsync_tree

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpoints:
    """The checkpoints of one run, in ``directory``."""

    def __init__(self, directory: str | Path, keep_last: int = 2) -> None:
        self.directory = Path(directory)
        self.keep_last = keep_last

    def save(self, step: int, write: Callable[[Path], None], score: float | None = None) -> Path:
        """Let ``write(folder)`` put its files into a fresh folder and make that the checkpoint of ``step``.

        Args:
            step: finished training steps.
            write: writes the files; may create sub-folders.
            score: evaluation score at this step, None where there was no evaluation; larger is better.

        Raises:
            CheckpointError: writing failed (full disk, quota, permissions). Nothing of it remains.
        """
        final = self.directory / f"step_{step:06d}"
        temporary = self.directory / f".{final.name}.{os.getpid()}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            _seal(temporary, step, score)
            if final.exists():
                # Reached only when that one was found damaged: a whole one is resumed from, not written again.
                shutil.rmtree(final)
            os.replace(temporary, final)
            fsync_directory(self.directory)
            # Damaged ones that a resume passed over: they must not outlive what was made since.
            for later in self.steps():
                if later > step:
                    self._remove(later)
        # Serialisers report a full disk in their own way: torch by RuntimeError, safetensors by SafetensorError.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            before = self.steps()
            kept = f"the checkpoint of step {before[-1]} is whole" if before else "there is none before it"
            raise CheckpointError(
                f"{final}: the checkpoint could not be written ({error}); {kept}. "
                "Make room and run the same command again to continue."
            ) from error
        self.prune()
        return final

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint; a damaged one is named in a warning and passed over.

        None where there is no checkpoint at all.

        Raises:
            DataError: there are some, and all are damaged: starting over would delete what the run has made.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            reason = damage(path)
            if reason is None:
                for one in damaged:
                    warnings.warn(f"{one}; falling back to the one before it", stacklevel=2)
                return step, path
            damaged.append(f"{path}: damaged checkpoint ({reason})")
        if damaged:
            raise DataError(
                f"{'; '.join(damaged)}. No other checkpoint is there to continue from: restore one, or choose another "
                "run.dir. Nothing was deleted"
            )
        return None

    def best(self) -> int | None:
        """Step with the highest evaluation score, the latest of equals; None where no kept checkpoint has a score."""
        scored = self._scored()
        return max(scored)[1] if scored else None

    def best_score(self, before: int) -> float | None:
        """Highest evaluation score of the checkpoints of steps below ``before``; None where none has a score."""
        return max((score for score, step in self._scored() if step < before), default=None)

    def score(self, step: int) -> float | None:
        """Evaluation score of the checkpoint of ``step``; None where it has none, or there is no such checkpoint."""
        score = _manifest(self.path(step)).get("score")
        return score if isinstance(score, int | float) else None

    def rate(self, step: int, score: float) -> None:
        """Give the checkpoint of ``step`` the score of an evaluation that was made after it was written."""
        path = self.path(step)
        atomic_write(path / MANIFEST, _dump(_manifest(path) | {"score": score}))

    def _scored(self) -> list[tuple[float, int]]:
        """(score, step) of the checkpoints that have a score."""
        return [(score, step) for step in self.steps() if (score := self.score(step)) is not None]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.directory / f"step_{step:06d}"

    def prune(self) -> None:
        """Remove all but the last ``keep_last`` and the best, and what killed runs left behind."""
        keep = {*self.steps()[-self.keep_last :], self.best()}
        for step in self.steps():
            if step not in keep:
                self._remove(step)
        self.sweep()

    def _remove(self, step: int) -> None:
        # Renamed first: a kill while deleting must not leave half a folder under a checkpoint's name.
        os.replace(self.path(step), self.directory / f".{self.path(step).name}.{os.getpid()}.tmp")

    def sweep(self) -> None:
        """Remove what killed runs left behind; no checkpoint is touched."""
        for leftover in self.directory.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def damage(path: Path) -> str | None:
    """Why the checkpoint in ``path`` cannot be trusted, or None."""
    files = _manifest(path).get("files")
    if not isinstance(files, dict):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} does not match its hash"
    return None


def _seal(folder: Path, step: int, score: float | None) -> None:
    """Write the manifest and flush everything in ``folder`` to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {"step": step, "score": score, "files": {str(path.relative_to(folder)): _sha256(path) for path in files}}
    (folder / MANIFEST).write_text(_dump(manifest), encoding="utf-8")
    fsync_tree(folder)


def _dump(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    # A damaged manifest is a damaged checkpoint: damage() reports it by the missing "files".
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
