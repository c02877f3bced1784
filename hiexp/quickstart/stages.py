"""Stages of a long job: each makes one folder, whole or not at all, and is not made twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hiexp.io import fsync_directory, fsync_tree

Say = Callable[[str], None]


def stage(folder: Path, make: Callable[[Path], None], say: Say, title: str) -> None:
    """Make ``folder`` by ``make(temporary folder)`` unless it is there: a kill leaves all of it or nothing."""
    if folder.is_dir():
        say(f"{title}: done before")
        return
    say(title)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    make(temporary)
    fsync_tree(temporary)
    os.replace(temporary, folder)
    fsync_directory(folder.parent)
