"""Summaries that cost something are kept beside the HEK: a killed or repeated build does not pay for them twice.

A build is one transaction: killed, it leaves the HEK as it was. What a language model said about a cluster by then is
in ``HEK.summaries.jsonl``, one line a cluster, keyed by the model, the level and the content of the members.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiexp.experience.distill import RejectedReply
from hiexp.experience.record import Experience, Level
from hiexp.experience.summarise import Summariser
from hiexp.io import atomic_write, read_jsonl


class RememberedSummaries:
    """A summariser that asks ``inner`` only about clusters it was not asked about before.

    Args:
        inner: what summarises. name: which model that is; another name is another memory.
        file: the memory; made with the first summary.

    Attributes:
        rejected: those of ``inner``. What it said instead of a rejected reply is not kept: the model is asked again.
        remembered: how many summaries came from the file.

    Raises:
        DataError: an unreadable file; the message names file and line.
    """

    def __init__(self, inner: Summariser, name: str, file: Path) -> None:
        self.inner, self.file, self._name = inner, file, name
        self.remembered = 0
        rows = []
        if file.exists():
            data = file.read_bytes()
            if not data.endswith(b"\n"):  # a line that a kill cut short must not swallow the next one
                atomic_write(file, data[: data.rfind(b"\n") + 1])
            rows = [row for _, row in read_jsonl(file, ["key", "summary"], torn_tail=True)]
        self._known: dict[str, Any] = {row["key"]: row["summary"] for row in rows}

    @property
    def rejected(self) -> Sequence[RejectedReply]:
        """Replies of the model that could not be used."""
        found: Sequence[RejectedReply] = getattr(self.inner, "rejected", ())
        return found

    def summarise(self, children: Sequence[Experience], level: Level) -> Experience | None:
        """The entry for ``children``, from memory where they were summarised before."""
        key = self._key(children, level)
        if key in self._known:
            self.remembered += 1
            stored = self._known[key]
            return None if stored is None else Experience.from_json(stored)
        refused = len(self.rejected)
        summary = self.inner.summarise(children, level)
        if len(self.rejected) == refused:
            self._known[key] = None if summary is None else summary.to_json()
            self._append({"key": key, "summary": self._known[key]})
        return summary

    def _key(self, children: Sequence[Experience], level: Level) -> str:
        parts = [self._name, level, *(child.content_hash() for child in children)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
