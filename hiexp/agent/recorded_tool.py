"""Searches kept in a file: a cache in front of a slow or changing retriever, and replay without one.

A query is known by tool, corpus (``tool.identity`` where there is one), exact text and ``top_k``. Failures are not
kept. One SQLite file, written in transactions, so a kill loses at most the batch in flight; processes may share it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from hiexp.agent.tools import Document, Tool
from hiexp.io import DataError

_TABLE = (
    "CREATE TABLE IF NOT EXISTS searches (tool TEXT, query TEXT, top_k INTEGER, documents TEXT NOT NULL,"
    " PRIMARY KEY (tool, query, top_k)) WITHOUT ROWID"
)
_WAIT_S = 30.0  # for another process that writes


class RecordedTool:
    """A search tool that answers from a recording and asks ``tool`` for the rest, which it adds.

    Args:
        path: SQLite file, made where it is missing.
        tool: the tool behind it; None replays: a query that was not recorded is an error.
        name: which recording to replay, needed where the file holds several.

    Raises:
        DataError: the file is no recording, or replay of a file that is missing, empty, or of several tools.
    """

    def __init__(self, path: str | Path, tool: Tool | None = None, name: str | None = None) -> None:
        self.path, self.tool = Path(path), tool
        if tool is None and not self.path.is_file():
            raise DataError(f"{path}: no such recording of searches")
        self.remote = bool(getattr(tool, "remote", False))  # a replay waits for nobody
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        try:
            self._database = sqlite3.connect(self.path, timeout=_WAIT_S, check_same_thread=False)
            self._database.execute(_TABLE)
            names = [row[0] for row in self._database.execute("SELECT DISTINCT tool FROM searches ORDER BY tool")]
        except sqlite3.Error as error:
            raise DataError(f"{path}: expected a recording of searches (SQLite): {error}") from error
        self.name = self._only(names, name) if tool is None else getattr(tool, "identity", tool.name)
        self.identity = self.name

    def _only(self, names: list[str], wanted: str | None) -> str:
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted not in names:
            raise DataError(f"{self.path}: expected the recording of tool {wanted or '(one)'}, it has {names}")
        return str(wanted)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """Known queries from the file, the others from the tool in one batch, each distinct one once.

        Raises:
            LookupError: replaying, and a query was not recorded.
        """
        with self._lock:
            known = {query: self._read(query, top_k) for query in dict.fromkeys(queries)}
        missing = [query for query, found in known.items() if found is None]
        if missing:
            if self.tool is None:
                raise LookupError(f"{self.path}: no recorded search of {missing[0]!r} with top_k={top_k}")
            found = self.tool.search(missing, top_k)
            if len(found) != len(missing):
                raise ValueError(f"{self.name}: expected {len(missing)} lists of documents, got {len(found)}")
            self._write(dict(zip(missing, found, strict=True)), top_k)
            known |= zip(missing, found, strict=True)
        with self._lock:
            self.hits += len(known) - len(missing)
            self.misses += len(missing)
        return [list(known[query] or ()) for query in queries]

    def _read(self, query: str, top_k: int) -> list[Document] | None:
        row = self._database.execute(
            "SELECT documents FROM searches WHERE tool = ? AND query = ? AND top_k = ?",
            (self.name, _text(query), top_k),
        ).fetchone()
        return None if row is None else [Document(*fields) for fields in json.loads(row[0])]

    def _write(self, found: dict[str, list[Document]], top_k: int) -> None:
        rows = [
            (self.name, _text(query), top_k, json.dumps([[doc.id, doc.title, doc.text] for doc in documents]))
            for query, documents in found.items()
        ]
        with self._lock, self._database:
            self._database.executemany("INSERT OR IGNORE INTO searches VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _text(query: str) -> str:
    """The query as SQLite can hold it; JSON keeps lone surrogates apart from the text they would be replaced by."""
    return json.dumps(query)
