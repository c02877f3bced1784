"""Snapshots and retrieval: the same snapshot and query give the same entries in the same order, on any device.

A :class:`Snapshot` is what rollouts are pinned to: the active entries with their vectors, immutable, named by a hash of
its content. Entries are sorted by exp_id, so ties of the exact search (index.py) go to the lower exp_id.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiexp.experience.encoder import Encoder, make_encoder
from hiexp.experience.guard import text_key
from hiexp.experience.index import ExactIndex
from hiexp.experience.prompt import TEMPLATE_VERSION
from hiexp.experience.record import LEVELS, Experience
from hiexp.io import DataError, atomic_write
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.experience.store import HEK

_NO_THRESHOLD = -1.0  # the least cosine
_LevelIndex = tuple[NDArray[np.intp], ExactIndex]  # of some levels: rows of the snapshot, their search


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved entry; ``score`` is the cosine similarity of its title and the query, rounded to six decimals."""

    experience: Experience
    score: float


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The entries a rollout may be shown; equal ids are equal snapshots. Made by ``HEK.snapshot()`` or :meth:`read`.

    Attributes:
        entries: n active entries, sorted by exp_id.
        embeddings: (n, d) float32 unit rows of their titles, read-only.
        encoder_id, encoder_spec: which encoder made them, and how to load it (empty: only the caller can).
        thresholds: ``E1``: calibrated cosine at and above which an E1 entry is served; ``E2``, ``E3``: clustering
            heights.
        aliases: question id -> key of its normalised text, for the questions that entries came from.
        template: version of the prompt template.
        id: SHA-256 over all of the above but vectors and spec: the vectors follow from titles and encoder.
    """

    entries: tuple[Experience, ...]
    embeddings: NDArray[np.float32] = field(repr=False)
    encoder_id: str
    encoder_spec: str
    thresholds: Mapping[str, float]
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    template: str = TEMPLATE_VERSION
    id: str = field(init=False)
    _hidden: Mapping[str, frozenset[int]] = field(init=False, repr=False)
    _indexes: dict[tuple[str, ...], _LevelIndex] = field(init=False, repr=False)
    _encoders: list[Encoder] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        embeddings = np.array(self.embeddings, dtype=np.float32, order="C")
        if embeddings.ndim != 2 or len(embeddings) != len(self.entries):
            raise ValueError(f"embeddings: expected ({len(self.entries)}, d), a row an entry, got {embeddings.shape}")
        embeddings.flags.writeable = False
        ids = [entry.exp_id for entry in self.entries]
        if ids != sorted(set(ids)):
            raise ValueError("entries: expected distinct exp_ids in ascending order")
        for name, value in {
            "entries": tuple(self.entries),
            "embeddings": embeddings,
            "thresholds": MappingProxyType(dict(self.thresholds)),
            "aliases": MappingProxyType(dict(self.aliases)),
            "id": _content_id(self),
            "_hidden": _hidden_rows(self.entries, self.aliases),
            "_indexes": {},
            "_encoders": [],
        }.items():
            object.__setattr__(self, name, value)  # frozen for everybody else

    def __len__(self) -> int:
        return len(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles carry the content alone: indexes are rebuilt, the encoder is loaded again from its spec.
        thresholds, aliases = dict(self.thresholds), dict(self.aliases)
        return Snapshot, (
            self.entries, self.embeddings, self.encoder_id, self.encoder_spec, thresholds, aliases, self.template
        )  # fmt: skip

    @property
    def encoder(self) -> Encoder:
        """The encoder of the queries; loaded on first use.

        Raises:
            ValueError: it has no spec and was not given with :meth:`with_encoder`, or the spec now loads another model.
        """
        if not self._encoders:
            if not self.encoder_spec:
                raise ValueError(f"encoder: {self.encoder_id!r} cannot be loaded by name; pass it to with_encoder()")
            self.with_encoder(make_encoder(self.encoder_spec))
        return self._encoders[0]

    def with_encoder(self, encoder: Encoder) -> Snapshot:
        """Encode queries with ``encoder`` (already loaded, or one without a spec); its id must be the snapshot's."""
        if encoder.id != self.encoder_id:
            raise ValueError(
                f"encoder: expected {self.encoder_id!r}, which the entries were encoded with, got {encoder.id!r}"
            )
        self._encoders[:] = [encoder]
        return self

    def retrieve(
        self,
        text: str,
        *,
        level: str | Sequence[str] = LEVELS,
        top_k: int = 5,
        threshold: float | None = None,
        exclude_question: str | Question | None = None,
    ) -> list[Hit]:
        """The ``top_k`` entries nearest to ``text``, best first; arguments as in :meth:`retrieve_many`."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        return self.retrieve_many(
            [text], level=level, top_k=top_k, threshold=threshold, exclude_questions=[exclude_question]
        )[0]

    def retrieve_many(
        self,
        texts: Sequence[str],
        *,
        level: str | Sequence[str] = LEVELS,
        top_k: int = 5,
        threshold: float | None = None,
        exclude_questions: Sequence[str | Question | None] | None = None,
    ) -> list[list[Hit]]:
        """For each text the ``top_k`` nearest entries, sorted by (-score, exp_id); one call of the encoder.

        Of entries with the same description only the first is returned: nobody gains from reading a line twice.

        Args:
            level: ``"E1"``, ``"E2"``, ``"E3"`` or several of them.
            threshold: least score. None: the calibrated threshold for E1 entries, none for E2 and E3. -1 serves all.
            exclude_questions: per text, the question being answered (its id, its text, or the Question). An E1 entry
                that came from it or from a question with the same normalised text is left out; an E2 or E3 entry only
                if all its questions are that one, because a pattern over several questions is not that question's
                answer.

        Raises:
            ValueError: unknown level, ``top_k`` < 1, a threshold outside -1..2, or lengths that differ.
        """
        levels = _check_levels(level)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k: expected a positive integer, got {top_k!r}")
        if threshold is not None and not -1.0 <= threshold <= 2.0:  # NaN too
            raise ValueError(f"threshold: expected a similarity in -1..2 (above 1 serves nothing), got {threshold!r}")
        questions = [None] * len(texts) if exclude_questions is None else list(exclude_questions)
        if len(questions) != len(texts):
            raise ValueError(f"exclude_questions: expected {len(texts)} items, one a text, got {len(questions)}")
        rows, index = self._index(levels)
        if len(texts) == 0 or len(rows) == 0:
            return [[] for _ in texts]
        hidden = [
            [int(p) for p in np.searchsorted(rows, sorted(out)) if p < len(rows) and rows[p] in out]
            for out in map(self._hidden_from, questions)
        ]
        queries = self.encoder.encode(texts)
        return self._distinct(queries, rows, index, top_k, threshold, hidden)

    def _distinct(
        self,
        queries: NDArray[np.float32],
        rows: NDArray[np.intp],
        index: ExactIndex,
        top_k: int,
        threshold: float | None,
        hidden: Sequence[Sequence[int]],
    ) -> list[list[Hit]]:
        """The best entries of different descriptions; asks for more wherever repeats took places."""
        found: list[list[Hit]] = [[] for _ in queries]
        open_, depth = list(range(len(queries))), top_k
        while open_:
            ranked = index.search(queries[open_], depth, [hidden[i] for i in open_], threshold)
            for i, places in zip(open_, ranked, strict=True):
                first: dict[str, Hit] = {}
                for place, score in places:
                    entry = self.entries[rows[place]]
                    first.setdefault(entry.description, Hit(entry, score))
                found[i] = list(first.values())[:top_k]
            # A query is done when it has top_k lessons, or when nothing is left that could be served.
            open_ = [
                i for i, places in zip(open_, ranked, strict=True) if len(found[i]) < top_k and len(places) == depth
            ]
            depth *= 4
        return found

    def _index(self, levels: tuple[str, ...]) -> _LevelIndex:
        if levels not in self._indexes:
            rows = np.array([row for row, entry in enumerate(self.entries) if entry.level in levels], np.intp)
            vectors = self.embeddings if len(rows) == len(self.entries) else self.embeddings[rows]
            e1 = self.thresholds["E1"]
            least = np.array([e1 if self.entries[row].level == "E1" else _NO_THRESHOLD for row in rows], np.float64)
            self._indexes[levels] = rows, ExactIndex(vectors, least)
        return self._indexes[levels]

    def _hidden_from(self, question: str | Question | None) -> frozenset[int]:
        if question is None:
            return frozenset()
        name, text = (question, question) if isinstance(question, str) else (question.id, question.text)
        names = {name, self.aliases.get(name, name), text_key(text)}
        return frozenset().union(*(self._hidden.get(name, frozenset()) for name in names))

    def write(self, path: str | Path) -> None:
        """Write an immutable copy (numpy's .npz, crash-safe) that :meth:`read` loads without the HEK."""
        header = {
            "id": self.id, "encoder_id": self.encoder_id, "encoder_spec": self.encoder_spec, "template": self.template,
            "thresholds": dict(self.thresholds), "aliases": dict(self.aliases),
            "entries": [entry.to_json() for entry in self.entries],
        }  # fmt: skip
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        np.savez_compressed(buffer, header=text, embeddings=self.embeddings)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def read(cls, path: str | Path) -> Snapshot:
        """Load what :meth:`write` wrote.

        Raises:
            DataError: a missing or damaged file, or content that does not match the id in it.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: no such snapshot file")
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                header["entries"] = tuple(map(Experience.from_json, header["entries"]))
                expected = header.pop("id")
                snapshot = cls(embeddings=archive["embeddings"], **header)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged, or not a snapshot ({error})") from error
        if snapshot.id != expected:
            raise DataError(f"{path}: its content does not match its id {expected[:12]}")
        return snapshot


def retrieve(source: HEK | Snapshot, text: str, **options: Any) -> list[Hit]:
    """Retrieve from a HEK or a snapshot; ``options`` as in :meth:`Snapshot.retrieve`."""
    return source.retrieve(text, **options)


def _content_id(snapshot: Snapshot) -> str:
    header = [snapshot.encoder_id, dict(snapshot.thresholds), dict(snapshot.aliases), snapshot.template]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for entry in snapshot.entries:
        digest.update(json.dumps(entry.to_json(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _check_levels(level: str | Sequence[str]) -> tuple[str, ...]:
    levels = [level] if isinstance(level, str) else list(level)
    if not levels or any(name not in LEVELS for name in levels):
        raise ValueError(f"level: expected one or several of {', '.join(LEVELS)}, got {level!r}")
    return tuple(sorted(set(levels)))


def _hidden_rows(entries: Iterable[Experience], aliases: Mapping[str, str]) -> dict[str, frozenset[int]]:
    """Name of a question (id or text key) -> rows never served to it."""
    hidden: dict[str, set[int]] = {}
    for row, entry in enumerate(entries):
        questions = {aliases.get(question, question) for question in entry.qa_groups}
        if entry.level == "E1":
            # An E1 title is, as a rule, its question: the key covers questions that nobody registered.
            names = {*questions, *entry.qa_groups, text_key(entry.title)}
        else:
            names = {*questions, *entry.qa_groups} if len(questions) == 1 else set()
        for name in names:
            hidden.setdefault(name, set()).add(row)
    return {name: frozenset(rows) for name, rows in hidden.items()}
