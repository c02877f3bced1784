"""Corpora of passages: read row by row from a JSONL file, kept on disk, served by row number.

Nothing here holds a whole corpus in memory: Wikipedia in 21 million passages takes 250 MB while it is copied and
nothing while it is served.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.tools import Document
from hiexp.io import DataError, read_jsonl

_TEXTS, _OFFSETS, _COUNTS = "documents.jsonl", "offsets.npy", "counts.json"
_HASH_BLOCK = 1 << 20


def read_corpus(path: str | Path) -> Iterator[Document]:
    """Passages of a JSONL(.gz) file with ``text`` (and ``title``) or ``contents`` (``title`` newline ``text``).

    ``id`` may be absent: the line number stands in. Ids used twice are found after the last row.

    Raises:
        DataError: unusable file or row, an id used twice; the message names file and line.
    """
    seen, lines = array("Q"), array("Q")  # 16 bytes a passage; a dict of ids would be ten times that
    for line, document in _documents(path):
        seen.append(_id_hash(document.id))
        lines.append(line)
        yield document
    _check_unique(path, np.frombuffer(seen, np.uint64), np.frombuffer(lines, np.uint64))


def _documents(path: str | Path) -> Iterator[tuple[int, Document]]:
    for line, row in read_jsonl(path):
        if "text" in row:
            title, text = row.get("title", ""), row["text"]
        elif "contents" in row:
            head, _, rest = str(row["contents"]).partition("\n")
            title, text = (head.strip().strip('"'), rest) if rest else ("", row["contents"])
        else:
            raise DataError(f"{path}:{line}: expected the key 'text' or 'contents', got {sorted(row)[:12]}")
        if not isinstance(title, str) or not isinstance(text, str):
            raise DataError(f"{path}:{line}: expected strings as title and text, got {title!r:.40} and {text!r:.40}")
        yield line, Document(str(row.get("id", line)), title, text)


def _id_hash(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode("utf-8"), digest_size=8).digest(), "little")


def _check_unique(path: str | Path, seen: NDArray[np.uint64], lines: NDArray[np.uint64]) -> None:
    order = np.argsort(seen, kind="stable")
    same = np.flatnonzero(seen[order[1:]] == seen[order[:-1]])
    if len(same) == 0:
        return
    # Equal hashes are equal ids but for a collision, which only the ids themselves can tell.
    suspects = set(lines[order[same]].tolist()) | set(lines[order[same + 1]].tolist())
    used: dict[str, int] = {}
    for line, document in _documents(path):
        if line not in suspects:
            continue
        if document.id in used:
            raise DataError(f"{path}:{line}: id {document.id!r} was used before, at {path}:{used[document.id]}")
        used[document.id] = line


def corpus_identity(path: str | Path) -> dict[str, Any]:
    """What tells one corpus from another: SHA-256 and length of the file, and its name for messages.

    Raises:
        DataError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


class DocumentStore:
    """Documents by row number, read from memory-mapped files: a large corpus takes no memory.

    Attributes:
        empty_passages: rows of the corpus that were left out because they hold no text.
    """

    def __init__(self, folder: Path) -> None:
        self._offsets: NDArray[np.int64] = np.load(folder / _OFFSETS, mmap_mode="r")
        with open(folder / _TEXTS, "rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        self.empty_passages: int = counts["empty_passages"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Document:
        return Document(*json.loads(self._bytes[self._offsets[row] : self._offsets[row + 1]]))


def store_documents(corpus: str | Path, folder: Path) -> Iterator[Document]:
    """Copy ``corpus`` into ``folder`` for :class:`DocumentStore`, yielding each document on the way.

    Passages without any visible character are left out and counted: no search could find them, or should.

    Raises:
        DataError: unusable file or row, or empty passages only.
    """
    offsets, empty = array("q", [0]), 0
    with open(folder / _TEXTS, "wb") as stream:
        for document in read_corpus(corpus):
            if is_blank(document):
                empty += 1
                continue
            stream.write(json.dumps([document.id, document.title, document.text], ensure_ascii=False).encode() + b"\n")
            offsets.append(stream.tell())
            yield document
    if len(offsets) == 1:
        raise DataError(f"{corpus}: expected passages with text, got empty ones only")
    (folder / _COUNTS).write_text(json.dumps({"empty_passages": empty}), encoding="utf-8")
    with open(folder / f".{_OFFSETS}", "wb") as stream:
        np.save(stream, np.frombuffer(offsets, dtype=np.int64))
    (folder / f".{_OFFSETS}").rename(folder / _OFFSETS)


def has_documents(folder: Path) -> bool:
    """Whether :func:`store_documents` ran to its end in ``folder``."""
    return (folder / _OFFSETS).exists()


def is_blank(document: Document) -> bool:
    """Whether neither title nor text has a visible character (zero-width ones and controls do not count)."""
    return not any(char.isprintable() and not char.isspace() for char in document.title + document.text)
