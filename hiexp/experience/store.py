"""HEK: the hierarchical experience knowledge base in one SQLite file.

Entries are immutable revisions: a change is a new revision, nothing is ever updated or deleted. One process writes, any
number read. What is served is pinned by :meth:`HEK.snapshot`; the guard runs on every write, and what it refuses is
kept as ``quarantine`` with the reason. One HEK holds vectors of one encoder.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hiexp.experience import calibrate as calibration_module
from hiexp.experience import schema
from hiexp.experience.calibrate import Calibration
from hiexp.experience.database import Database
from hiexp.experience.encoder import Encoder, make_encoder
from hiexp.experience.guard import Guard, hash_answers, text_key
from hiexp.experience.record import LEVELS, STATUSES, Experience, new_exp_id, validate
from hiexp.experience.retrieve import Hit, Snapshot
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.experience.abstract import HierarchyReport

_OUT_OF_USE = ("quarantine", "retired")
_IN_USE = tuple(status for status in STATUSES if status not in _OUT_OF_USE)


class HEK:
    """Hierarchical experience knowledge: add, build the hierarchy, retrieve, snapshot.

    Make one with :meth:`create`, :meth:`open` or :meth:`import_`; close it, or use it as a context manager. An object
    may be shared by threads; a process forked from this one must open its own.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._encoder: Encoder | None = None
        self._guard: tuple[int, Guard] | None = None
        self._snapshot: tuple[tuple[int, int], Snapshot] | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        encoder: str | Encoder = "hashing",
        calibrate: Sequence[str] | None = None,
        *,
        exist_ok: bool = False,
    ) -> HEK:
        """Make an empty HEK and open it for writing.

        Args:
            path: must not exist, unless ``exist_ok``: then a HEK there with this very encoder is opened as it is.
            encoder: a spec (see :func:`~hiexp.experience.encoder.make_encoder`) or an encoder; fixed for ever.
            calibrate: titles or questions of the domain to calibrate the thresholds on. None starts from built-in
                reference questions; :meth:`build_hierarchy` recalibrates on its own titles once there are 50.

        Raises:
            ValueError: the file exists, an unknown encoder, or fewer than two distinct texts. DataError: not writable.
        """
        built = make_encoder(encoder)
        if exist_ok and Path(path).exists():
            return cls.open(path, "w", encoder=built)
        calibration = calibration_module.calibrate(built, calibrate)
        meta = {
            "encoder_id": built.id,
            "encoder_spec": built.spec,
            "salt": secrets.token_hex(8),
            "calibration": json.dumps(calibration.to_json()),
        }
        schema.create_file(Path(path), meta)
        return cls.open(path, "w", encoder=built)

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "w"] = "r", encoder: str | Encoder | None = None) -> HEK:
        """Open an existing HEK.

        Args:
            mode: ``"r"``, or ``"w"`` for the one writer.
            encoder: None loads the HEK's own when it is needed; otherwise it must be the very encoder of the HEK.

        Raises:
            ValueError: another encoder than the HEK's, or already open for writing, here or in another process.
            DataError: missing, truncated, no HEK, or of another schema version.
        """
        if mode not in ("r", "w"):
            raise ValueError(f"mode: expected 'r' or 'w', got {mode!r}")
        hek = cls(Database(Path(path), write=mode == "w"))
        if encoder is not None:
            try:
                hek._use_encoder(make_encoder(encoder))
            except BaseException:
                hek.close()
                raise
        return hek

    def close(self) -> None:
        """Close the file and let the next writer in; closing twice is harmless."""
        self.database.close()

    def __enter__(self) -> HEK:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self.database.path

    # ---------------------------------------------------------------- writing

    def transaction(self) -> AbstractContextManager[None]:
        """Group several writes: all of them reach the file, or none. ValueError on a HEK opened for reading."""
        return self.database.transaction()

    def add(self, experiences: Iterable[Experience]) -> list[Experience]:
        """Store experiences, all or none; return each as it is stored.

        An entry whose content (level, type, title, description, tags) is there already is not stored twice: its
        sources, questions and links join the existing entry in a new revision, whose status stays (a retired lesson
        that is found again stays retired). What the guard refuses is stored as ``quarantine``, the reason in
        ``meta["quarantine_reason"]``.

        Raises:
            TypeError, ValueError: a field of a wrong type, an unknown level or status, an exp_id already taken.
        """
        if isinstance(experiences, Experience):
            raise TypeError("experiences: expected a list of Experience, got one Experience")
        batch = [validate(experience) for experience in experiences]
        with self.transaction():
            self._encode_titles([experience.title for experience in batch])
            return [self._add_one(experience) for experience in batch]

    def _add_one(self, new: Experience) -> Experience:
        known = self.database.find_content(new.content_hash())
        if known is None:
            exp_id = new.exp_id or new_exp_id(new)
            if self.database.last(exp_id) is not None:
                raise ValueError(f"exp_id: {exp_id!r} exists with other content; change an entry with HEK.revise")
            return self._append(replace(new, exp_id=exp_id, rev=0))
        old = self.get(known)
        merged = replace(
            old,
            sources=_union(old.sources, new.sources),
            qa_groups=_union(old.qa_groups, new.qa_groups),
            parents=_union(old.parents, new.parents),
            children=_union(old.children, new.children),
        )
        return old if merged == old else self._append(merged)

    def revise(self, exp_id: str, **changes: Any) -> Experience:
        """Append a revision of an entry with some fields changed; where nothing changes, none is written.

        The guard decides as in :meth:`add`: an entry leaves quarantine with ``status="active"`` only if it passes now.

        Raises:
            KeyError: no such entry. ValueError, TypeError: level, exp_id or rev, an unknown field, or a bad value.
        """
        fixed = {"level", "exp_id", "rev"} & changes.keys()
        if fixed:
            raise ValueError(f"revise: {', '.join(sorted(fixed))} of an entry cannot be changed")
        with self.transaction():
            old = self.get(exp_id)
            new = validate(replace(old, **changes))
            if new == old:
                return old
            self._encode_titles([new.title])
            # Links change often (every build), what the guard reads seldom does.
            same = old.status in _IN_USE and new.content_hash() == old.content_hash()
            return self._append(new, guarded=same and new.thinking == old.thinking and new.qa_groups == old.qa_groups)

    def _append(self, experience: Experience, *, guarded: bool = False) -> Experience:
        reason = None if guarded or experience.status not in _IN_USE else self.guard.check(experience)
        if reason is not None:
            meta = {**experience.meta, "quarantine_reason": reason}
            experience = replace(experience, status="quarantine", meta=meta)
        stored = replace(experience, rev=experience.rev + 1)
        self.database.insert_revision(stored)
        if stored.status == "quarantine":
            why = str(stored.meta.get("quarantine_reason", "set by the caller"))
            self.database.insert_quarantine("entry", why, stored.exp_id, stored.rev, "")
        return stored

    def restore(self, experience: Experience) -> None:
        """Insert one revision of another HEK verbatim and unguarded; for imports."""
        if not experience.exp_id or experience.rev < 1:
            raise ValueError(
                f"expected exp_id and rev of a stored revision, got {experience.exp_id!r}, {experience.rev!r}"
            )
        self._encode_titles([experience.title])
        self.database.insert_revision(experience)

    def register_questions(self, questions: Iterable[Question]) -> list[Experience]:
        """Tell the guard the questions of the train and test sets and their gold answers (kept as salted hashes).

        Entries already stored are checked again; returns those that went into quarantine.
        """
        with self.transaction():
            golds: dict[str, Sequence[str]] = {}
            for question in questions:
                self.database.insert(
                    "questions", (question.id, text_key(question.text), question.text), existing="REPLACE"
                )
                golds[question.id] = question.golden_answers
            return self.register_answers(golds)

    def register_answers(self, gold_answers: Mapping[str, Sequence[str]] | Iterable[str]) -> list[Experience]:
        """As :meth:`register_questions`, for answers by question id, or plain ones whose question is not known."""
        by_question = gold_answers if isinstance(gold_answers, Mapping) else {"": list(gold_answers)}
        with self.transaction():
            for answer in hash_answers(by_question, self.database.meta("salt")):
                self.database.insert_answer(answer)
            self._guard = None
            return [self._append(entry) for entry in self.entries() if self.guard.check(entry) is not None]

    def quarantine_reply(self, raw: str, reason: str, context: Mapping[str, Any] | None = None) -> None:
        """Keep a reflector's reply that could not be used, with the reason; nothing is silently dropped."""
        with self.transaction():
            body = json.dumps({"raw": raw, "context": dict(context or {})}, sort_keys=True)
            self.database.insert_quarantine("reply", reason, None, None, body)

    def calibrate(self, texts: Sequence[str] | None = None, **options: Any) -> Calibration:
        """Replace the thresholds: from ``texts``, or from the E1 titles in use; options of ``calibrate.calibrate``.

        An E1 threshold that came from search queries (:meth:`calibrate_search`) stays.
        """
        source = "titles" if texts is None else "texts"
        texts = [entry.title for entry in self.entries("E1")] if texts is None else texts
        old, new = self.calibration, calibration_module.calibrate(self.encoder, texts, source=source, **options)
        if old.n_queries:
            thresholds = {**new.thresholds, "E1": old.thresholds["E1"]}
            new = replace(new, thresholds=thresholds, n_queries=old.n_queries)
        return self._keep(new)

    def calibrate_search(self, asked: Iterable[tuple[str, str]], **options: Any) -> Calibration:
        """Take the E1 threshold from searches: (question, query) pairs, against the E1 titles in use.

        Options of ``calibrate.calibrate_search``; too few queries or titles change nothing.
        """
        titles = [entry.title for entry in self.entries("E1")]
        return self._keep(calibration_module.calibrate_search(self.calibration, self.encoder, titles, asked, **options))

    def _keep(self, calibration: Calibration) -> Calibration:
        with self.transaction():
            self.database.set_meta("calibration", json.dumps(calibration.to_json()))
        return calibration

    def build_hierarchy(self, **options: Any) -> HierarchyReport:
        """Cluster E1 into E2 and E2 into E3; see :func:`hiexp.build_hierarchy`."""
        from hiexp.experience.abstract import build_hierarchy

        return build_hierarchy(self, **options)

    def _encode_titles(self, titles: Sequence[str]) -> None:
        missing = self.database.missing_vectors(titles)
        if missing:
            for title, vector in zip(missing, self.encoder.encode(missing), strict=True):
                self.database.insert_vector(title, vector)

    # ---------------------------------------------------------------- reading

    def get(self, exp_id: str, rev: int | None = None) -> Experience:
        """One entry: its current revision, or revision ``rev``. KeyError where there is none."""
        found = self.database.last(exp_id)
        if found is not None and rev is not None:
            found = next((one for one in self.revisions(exp_id) if one.rev == rev), None)
        if found is None:
            raise KeyError(f"no entry {exp_id!r}" if rev is None else f"no revision {rev} of entry {exp_id!r}")
        return found

    def revisions(self, exp_id: str) -> list[Experience]:
        """Every revision of an entry, oldest first; empty where there is none."""
        return self.database.revisions(exp_id)

    def entries(self, level: str | None = None, status: str | Sequence[str] | None = None) -> list[Experience]:
        """Current revisions sorted by exp_id, of one level and status where given.

        Args:
            status: one or several; None leaves out ``quarantine`` and ``retired``.
        """
        wanted = _IN_USE if status is None else (status,) if isinstance(status, str) else tuple(status)
        if not set(wanted) <= set(STATUSES) or level not in (None, *LEVELS):
            raise ValueError(
                f"entries: expected a level of {LEVELS}, statuses of {STATUSES}; got {level!r}, {status!r}"
            )
        return self.database.current(LEVELS if level is None else (level,), wanted)

    def entries_from(self, rollout_id: str) -> list[Experience]:
        """Entries drawn from one rollout, whatever their status."""
        return [self.get(exp_id) for exp_id in self.database.entries_of(rollout_id)]

    def quarantined(self) -> list[dict[str, Any]]:
        """What was refused, oldest first: ``kind`` (entry or reply), ``reason``, ``exp_id``, ``rev``, ``body``."""
        names = ("kind", "reason", "exp_id", "rev", "body")
        rows = self.database.rows(f"SELECT {', '.join(names)} FROM quarantine ORDER BY id")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def __iter__(self) -> Iterator[Experience]:
        """Entries in use (neither quarantine nor retired), sorted by exp_id."""
        return iter(self.entries())

    def __len__(self) -> int:
        """Number of entries in use, which iteration yields."""
        return self.database.count(_IN_USE)

    def snapshot(self) -> Snapshot:
        """What is active now, immutable; equal content gives an equal id."""
        version = self.database.version()
        cached = self._snapshot
        if cached is None or cached[0] != version:
            self._snapshot = cached = version, self._read_snapshot()
        return cached[1].with_encoder(self._encoder) if self._encoder is not None else cached[1]

    def _read_snapshot(self) -> Snapshot:
        with self.database.reading():
            entries = self.entries(status="active")
            calibration = self.calibration
            keys = self.database.questions("text_key")
            return Snapshot(
                entries=tuple(entries),
                embeddings=self.database.vectors([entry.title for entry in entries], calibration.dim),
                encoder_id=self.database.meta("encoder_id"),
                encoder_spec=self.database.meta("encoder_spec"),
                thresholds=calibration.thresholds,
                aliases={q: keys[q] for entry in entries for q in entry.qa_groups if q in keys},
            )

    def retrieve(self, text: str, **options: Any) -> list[Hit]:
        """Retrieve from what is active now; options as in :meth:`Snapshot.retrieve`."""
        return self.snapshot().retrieve(text, **options)

    def retrieve_many(self, texts: Sequence[str], **options: Any) -> list[list[Hit]]:
        """Retrieve for several texts; options as in :meth:`Snapshot.retrieve_many`."""
        return self.snapshot().retrieve_many(texts, **options)

    @property
    def encoder(self) -> Encoder:
        """The HEK's encoder, loaded on first use. ValueError where its spec is empty or now loads another model."""
        if self._encoder is None:
            spec = self.database.meta("encoder_spec")
            if not spec:
                raise ValueError(f"{self.path}: its encoder has no spec; pass it to HEK.open(..., encoder=...)")
            return self._use_encoder(make_encoder(spec))
        return self._encoder

    def _use_encoder(self, encoder: Encoder) -> Encoder:
        stored = self.database.meta("encoder_id")
        if encoder.id != stored:
            raise ValueError(
                f"{self.path}: holds vectors of encoder {stored!r}, got {encoder.id!r}; one HEK cannot mix two encoders"
            )
        self._encoder = encoder
        return encoder

    @property
    def guard(self) -> Guard:
        """The guard over every registered question and answer."""
        cached = self._guard
        if cached is None or cached[0] != self.database.rollbacks:
            texts = self.database.questions("text")
            guard = Guard.from_hashes(self.database.answers(), self.database.meta("salt"), texts)
            self._guard = cached = self.database.rollbacks, guard
        return cached[1]

    @property
    def calibration(self) -> Calibration:
        """The thresholds in force and where they come from."""
        return Calibration.from_json(json.loads(self.database.meta("calibration")))

    def export(self, path: str | Path, *, current_only: bool = False) -> int:
        """Write the HEK as JSON lines (gzipped where ``path`` ends in .gz); return the number of revisions written."""
        from hiexp.experience.transfer import export_hek

        return export_hek(self, path, current_only=current_only)

    @classmethod
    def import_(cls, source: str | Path, path: str | Path, encoder: str | Encoder | None = None) -> HEK:
        """Rebuild at ``path`` what :meth:`export` wrote and open it for writing; the snapshot id is the same.

        Raises:
            ValueError: ``path`` exists, another encoder, or one without a spec that was not passed.
            DataError: ``source`` is damaged (file and line named).
        """
        from hiexp.experience.transfer import import_hek

        return import_hek(source, path, encoder)


def _union(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))
