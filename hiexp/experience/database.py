"""Rows of the HEK's file: one connection, transactions, and the queries; what they mean is decided in store.py."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp.experience import schema
from hiexp.experience.guard import AnswerHash
from hiexp.experience.record import Experience
from hiexp.io import DataError

# Current revisions: SQLite takes the other columns from the row that holds the maximum.
_CURRENT = "SELECT exp_id, level, status, body, MAX(rev) FROM revisions GROUP BY exp_id"


class Database:
    """One open HEK file; may be shared by threads.

    Args:
        path: the file, checked by :func:`schema.connect`.
        write: take the writer's lock.

    Every method raises DataError, naming the file, where SQLite fails (damaged pages, full disk).
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        # Checked before the lock is taken, which leaves a file beside whatever path it is given.
        connection = schema.connect(path, write=False)
        self._lock = None
        if write:
            connection.close()
            self._lock = schema.WriterLock(path)
            try:
                connection = schema.connect(path, write=True)
            except BaseException:
                self._lock.release()
                raise
        self._connection = connection
        self._mutex = threading.RLock()
        self._depth = 0
        self._writes = 0
        self.rollbacks = 0  # whoever caches what it wrote must look at this

    def close(self) -> None:
        """Close the file and let the next writer in; closing twice is harmless."""
        with self._mutex:
            self._connection.close()
            if self._lock is not None:
                self._lock.release()

    # ---------------------------------------------------------------- transactions

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes: all of them reach the file, or none. Nests; an inner failure undoes the outer one too."""
        if self._lock is None:
            raise ValueError(f"{self.path}: open for reading; open it with mode='w' to write")
        with self._mutex:
            self._depth += 1
            self._writes += 1
            try:
                if self._depth == 1:
                    self.execute("BEGIN IMMEDIATE")
                yield
                if self._depth == 1:
                    self.execute("COMMIT")
            except BaseException:
                self.rollbacks += 1
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1
                self._writes += 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let several queries see one state of the file."""
        with self._mutex:
            outermost = not self._connection.in_transaction
            if outermost:
                self.execute("BEGIN")
            try:
                yield
            finally:
                if outermost:
                    self.execute("COMMIT")

    def version(self) -> tuple[int, int]:
        """Changes whenever this connection or another one has written."""
        with self._mutex:
            return self.rows("PRAGMA data_version")[0][0], self._writes

    def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Run one statement."""
        self.rows(sql, values)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of one query."""
        with self._mutex:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: {error}") from error

    def insert(self, table: str, values: Sequence[Any], *, existing: str = "ABORT") -> None:
        """Insert one row; ``existing`` is SQLite's conflict clause: ABORT, IGNORE or REPLACE."""
        self.execute(f"INSERT OR {existing} INTO {table} VALUES ({_marks(values)})", values)

    # ---------------------------------------------------------------- revisions

    def insert_revision(self, experience: Experience) -> None:
        """Insert one revision verbatim, with its sources."""
        body = json.dumps(experience.to_json(), sort_keys=True)
        key = experience.exp_id, experience.rev
        self.insert("revisions", (*key, experience.level, experience.status, experience.content_hash(), body))
        for rollout_id in experience.sources:
            self.insert("sources", (rollout_id, experience.exp_id), existing="IGNORE")

    def revisions(self, exp_id: str | None = None) -> list[Experience]:
        """Revisions of one entry, oldest first, or of all entries in the order they were written."""
        if exp_id is None:
            return [_parse(row) for row in self.rows("SELECT body FROM revisions ORDER BY rowid")]
        return [_parse(row) for row in self.rows("SELECT body FROM revisions WHERE exp_id = ? ORDER BY rev", (exp_id,))]

    def current(self, levels: Sequence[str], statuses: Sequence[str]) -> list[Experience]:
        """The last revisions that have one of ``levels`` and ``statuses``, sorted by exp_id."""
        where = f"level IN ({_marks(levels)}) AND status IN ({_marks(statuses)})"
        rows = self.rows(f"SELECT body FROM ({_CURRENT}) WHERE {where} ORDER BY exp_id", (*levels, *statuses))
        return [_parse(row) for row in rows]

    def count(self, statuses: Sequence[str]) -> int:
        """How many entries have one of ``statuses``."""
        where = f"status IN ({_marks(statuses)})"
        return int(self.rows(f"SELECT COUNT(*) FROM ({_CURRENT}) WHERE {where}", statuses)[0][0])

    def last(self, exp_id: str) -> Experience | None:
        """The current revision of an entry."""
        rows = self.rows("SELECT body FROM revisions WHERE exp_id = ? ORDER BY rev DESC LIMIT 1", (exp_id,))
        return _parse(rows[0]) if rows else None

    def find_content(self, content_hash: str) -> str | None:
        """Id of the entry that has, or once had, this content."""
        found = self.rows("SELECT exp_id FROM revisions WHERE content_hash = ? ORDER BY rowid LIMIT 1", (content_hash,))
        return str(found[0][0]) if found else None

    def entries_of(self, rollout_id: str) -> list[str]:
        """Ids of the entries drawn from one rollout."""
        return [
            row[0]
            for row in self.rows("SELECT exp_id FROM sources WHERE rollout_id = ? ORDER BY exp_id", (rollout_id,))
        ]

    # ---------------------------------------------------------------- the rest

    def meta(self, key: str) -> str:
        """One setting of the file."""
        return str(self.rows("SELECT value FROM meta WHERE key = ?", (key,))[0][0])

    def find_meta(self, key: str) -> str | None:
        """One setting of the file, None where it has none of that name."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        """Change one setting."""
        self.insert("meta", (key, value), existing="REPLACE")

    def missing_vectors(self, titles: Sequence[str]) -> list[str]:
        """The distinct ones of ``titles`` that have no vector yet."""
        known = "SELECT 1 FROM embeddings WHERE title = ?"
        return [title for title in dict.fromkeys(titles) if not self.rows(known, (title,))]

    def insert_vector(self, title: str, vector: NDArray[np.float32]) -> None:
        """Keep the vector (d,) of a title."""
        self.insert("embeddings", (title, vector.astype("<f4").tobytes()), existing="IGNORE")

    def vectors(self, titles: Sequence[str], dim: int) -> NDArray[np.float32]:
        """Vectors (n, d) of n titles."""
        stored: Mapping[str, bytes] = dict(self.rows("SELECT title, vector FROM embeddings"))
        return np.frombuffer(b"".join(stored[title] for title in titles), "<f4").reshape(len(titles), dim)

    def answers(self) -> list[AnswerHash]:
        """Registered gold answers, hashed."""
        columns = "digest, first, n_tokens, question_id, own_only"
        rows = self.rows(f"SELECT {columns} FROM answers ORDER BY question_id, digest")
        return [AnswerHash(digest, first, n, question, bool(own)) for digest, first, n, question, own in rows]

    def insert_answer(self, answer: AnswerHash) -> None:
        """Keep one hashed gold answer."""
        values = answer.digest, answer.first, answer.n_tokens, answer.question_id, int(answer.own_only)
        self.insert("answers", values, existing="IGNORE")

    def questions(self, column: str) -> dict[str, str]:
        """Question id -> ``text_key`` or ``text``."""
        return dict(self.rows(f"SELECT question_id, {column} FROM questions"))

    def insert_quarantine(self, kind: str, reason: str, exp_id: str | None, rev: int | None, body: str) -> None:
        """Keep what was refused."""
        self.insert("quarantine", (None, kind, reason, exp_id, rev, body))


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _parse(row: tuple[Any, ...]) -> Experience:
    return Experience.from_json(json.loads(row[0]))
