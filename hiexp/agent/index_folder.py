"""Index directories: built once per corpus and settings, whole or not there, continued after a kill.

A directory is filled under another name and renamed when complete. Its manifest names corpus, settings and the size of
every file, so an index of another corpus or encoder is refused and a damaged one is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hiexp.agent.corpus import corpus_identity
from hiexp.io import DataError, atomic_write, fsync_directory, fsync_tree

MANIFEST = "manifest.json"
_PLAN, _LOCK = "plan.json", ".lock"
Settings = dict[str, Any]


def cached_index(
    corpus: str | Path,
    cache_dir: str | Path | None,
    settings: Settings,
    build: Callable[[Path], None],
    *,
    resumable: bool = False,
) -> Path:
    """The index directory of ``corpus`` under ``settings``; ``build(folder)`` fills it where there is none yet.

    Args:
        cache_dir: where indexes live; None: ``$HIEXP_CACHE/indexes`` (default ``~/.cache/hiexp/indexes``).
        resumable: ``build`` continues what an earlier call left in ``folder`` when it was killed.
    """
    plan = {"corpus": corpus_identity(corpus), "settings": settings}
    root = Path(os.environ.get("HIEXP_CACHE", "~/.cache/hiexp"), "indexes") if cache_dir is None else Path(cache_dir)
    final = root.expanduser() / f"{settings['kind']}-{_key(plan)}"
    return _ensure(final, plan, build, resumable)


def index_at(
    folder: str | Path,
    corpus: str | Path,
    settings: Settings,
    build: Callable[[Path], None],
    *,
    resumable: bool = False,
    **notes: str,
) -> Path:
    """Like :func:`cached_index` in a directory of the caller's choice; ``notes`` are kept in the manifest.

    Raises:
        ValueError: ``folder`` holds the index, or the unfinished index, of another corpus or other settings.
        DataError: ``folder`` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not is_whole(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: expected an empty directory or an index, got something else or a damaged index")
    plan = {"corpus": corpus_identity(corpus), "settings": settings, **notes}
    if folder.is_dir() and is_whole(folder):
        check_plan(folder, read_manifest(folder), plan)
    return _ensure(folder, plan, build, resumable)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a whole index.

    Raises:
        DataError: no index there, or files of it are missing or cut short.
    """
    folder = Path(folder)
    if not is_whole(folder):
        state = "a damaged or unfinished index" if (folder / MANIFEST).exists() else "none"
        raise DataError(f"{folder}: expected an index made by 'hiexp index', got {state}")
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def check_plan(folder: str | Path, manifest: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse the index of another corpus, encoder or method.

    Args:
        wanted: ``{"corpus": …, "settings": …}``; keys that are absent are not compared.

    Raises:
        ValueError: names what the index has and what was wanted.
    """
    ours, theirs = wanted.get("corpus"), manifest["corpus"]
    if ours is not None and ours["sha256"] != theirs["sha256"]:
        raise ValueError(
            f"{folder}: holds the index of another corpus, {theirs['file']} ({theirs['bytes']:,} bytes, sha256 "
            f"{theirs['sha256'][:12]}); wanted {ours['file']} ({ours['bytes']:,} bytes, sha256 {ours['sha256'][:12]})"
        )
    for key, value in wanted.get("settings", {}).items():
        held = manifest["settings"].get(key)
        if held != value:
            raise ValueError(f"{folder}: holds an index with {key} {held!r}; wanted {key} {value!r}")


def identity_of(folder: str | Path) -> str:
    """A short name of what an index answers from: its corpus and settings, wherever it lies."""
    manifest = read_manifest(folder)
    return _key({"corpus": manifest["corpus"], "settings": manifest["settings"]})


def is_whole(folder: Path) -> bool:
    """Whether every file the manifest lists is there in full (somebody may have cleaned up half of a cache)."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _key(plan: dict[str, Any]) -> str:
    known = {"corpus": plan["corpus"]["sha256"], "settings": plan["settings"]}  # a file may be renamed
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _ensure(final: Path, plan: dict[str, Any], build: Callable[[Path], None], resumable: bool) -> Path:
    if is_whole(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    if resumable:
        _build_resumable(final, plan, build)
        return final
    building = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    building.chmod(0o755)  # others may serve what this user builds
    try:
        build(building)
        _finish(building, final, plan)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _build_resumable(final: Path, plan: dict[str, Any], build: Callable[[Path], None]) -> None:
    building = final.with_name(f".{final.name}.part")
    building.mkdir(exist_ok=True)
    with build_lock(building, final):
        # Whoever held the lock before may have finished it.
        if is_whole(final):
            shutil.rmtree(building, ignore_errors=True)
            return
        held = building / _PLAN
        if held.exists():
            check_plan(building, json.loads(held.read_text(encoding="utf-8")), plan)
        else:
            atomic_write(held, json.dumps(plan))
        try:
            build(building)
        except ValueError:
            # Input that cannot be used: with nothing done there is nothing to continue.
            if not any(path.suffix == ".npy" for path in building.iterdir()):
                shutil.rmtree(building, ignore_errors=True)
            raise
        held.unlink()
        _finish(building, final, plan)
        (final / _LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def build_lock(building: Path, final: Path) -> Iterator[None]:
    """One builder of ``final`` at a time; the kernel releases the lock of a process that dies."""
    with open(building / _LOCK, "w", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{final}: another process builds this index; waiting for it", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _finish(building: Path, final: Path, plan: dict[str, Any]) -> None:
    """Write the manifest and put the directory in its place."""
    sizes = {path.name: path.stat().st_size for path in building.iterdir() if not path.name.startswith(".")}
    (building / MANIFEST).write_text(json.dumps({**plan, "sizes": sizes}, indent=1), encoding="utf-8")
    fsync_tree(building)
    if final.exists() and not is_whole(final):
        shutil.rmtree(final)
    try:
        os.rename(building, final)
    except OSError:
        # Another process was faster; its index is the same.
        if not is_whole(final):
            raise
    fsync_directory(final.parent)
