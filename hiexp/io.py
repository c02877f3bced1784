"""Files: crash-safe writing and JSON-lines reading whose errors name file and line.

Every file hiexp writes goes through :func:`atomic_write`: a temporary name, fsync, then rename, so that a reader sees
the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_TAIL_BLOCK = 1 << 16


class DataError(ValueError):
    """Input data that cannot be used; the message starts with ``path:line:`` where a line is known."""


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a crash at any moment leaves the old content or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path):
            with open(temporary, "wb") as stream:
                stream.write(data.encode("utf-8") if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk or an exceeded quota is reported by writes, which know no name: say which file and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "make room and run the same command again to continue"
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(path)) from error


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and directory in ``folder`` to the disk, before a rename makes it final."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync_directory(path)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write ``rows`` as JSON lines, gzipped where the name ends in ``.gz``; return how many were written."""
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    # mtime=0 keeps the bytes equal for equal content.
    atomic_write(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)
    return len(lines)


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append ``rows`` to a log, see :func:`append_lines`. Read it with ``read_jsonl(path, torn_tail=True)``."""
    append_lines(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows))


def append_lines(path: str | Path, lines: str) -> None:
    """Append whole ``lines`` to a log and flush them to the disk; a line that a kill cut short is removed first.

    One writer at a time.
    """
    with _named(Path(path)), open(path, "ab+") as stream:
        stream.truncate(_whole_lines(stream))
        stream.write(lines.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def _whole_lines(stream: BinaryIO) -> int:
    """Length of the file up to and including its last line break."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _TAIL_BLOCK)
        stream.seek(start)
        place = stream.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def read_jsonl(
    path: str | Path, required: Sequence[str] = (), *, torn_tail: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number from 1, object)`` of a ``.jsonl`` or ``.jsonl.gz`` file; blank lines are skipped.

    With ``torn_tail`` the file is a log that a kill may have cut short: a last line without its newline is left out,
    and a log without any whole line yields nothing.

    Raises:
        DataError: missing, empty, truncated, wrongly encoded or malformed file, a line that is no object, or a line
            without one of the ``required`` keys. The message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a file, it is a folder" if path.is_dir() else f"{path}: no such file")
    line_number, seen = 0, 0
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            for line_number, raw in enumerate(stream, start=1):
                if not raw.strip() or (torn_tail and not raw.endswith(b"\n")):
                    continue
                row = _parse_line(path, line_number, raw)
                missing = [key for key in required if key not in row]
                if missing:
                    names = ", ".join(map(repr, missing))
                    raise DataError(f"{path}:{line_number}: expected the key(s) {names}; got {sorted(row)[:12]}")
                seen += 1
                yield line_number, row
    except gzip.BadGzipFile as error:
        raise DataError(f"{path}:1: expected gzip data, as its name says, got something else") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}:{line_number + 1}: truncated or damaged gzip data ({error})") from error
    if seen == 0 and not torn_tail:
        raise DataError(f"{path}: empty file, expected JSON lines")


def _parse_line(path: Path, line_number: int, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line_number}: not valid UTF-8 (byte {error.start} of the line)") from error
    try:
        row = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair is legal in an escape, but it can be neither tokenised nor written again.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{line_number}: not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{path}:{line_number}: a string with a lone surrogate escape, not valid Unicode") from error
    except (ValueError, RecursionError) as error:
        # Integers of more than 4300 digits, and thousands of nested brackets.
        raise DataError(f"{path}:{line_number}: not usable JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line_number}: expected a JSON object, got {type(row).__name__}")
    return row
