"""Two or more HEKs side by side: what is in each, what it cost, how alike the lessons are, what questions are served.

Made for self-distillation against a teacher (paper, section on distillation): the same rollouts, two reflectors.
Everything here needs no model but the HEK's own encoder; answering questions with each is ``hiexp compare --model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.experience.guard import leaking_entries
from hiexp.experience.ledger import Tally, read_ledger
from hiexp.experience.record import LEVELS, Experience

if TYPE_CHECKING:
    from hiexp.experience.store import HEK
    from hiexp.tasks.question import Question


def describe(hek: HEK) -> dict[str, Any]:
    """Size, refusals, lengths and cost of one HEK.

    Keys: ``snapshot_id``, ``encoder``, ``entries`` per level, ``questions`` (distinct ones behind the lessons),
    ``quarantined_entries``, ``rejected_replies``, ``words`` (mean length of a lesson's description), ``reflectors``
    (what each has done: see :class:`hiexp.experience.ledger.Tally`).
    """
    lessons = hek.entries("E1")
    refused = hek.quarantined()
    return {
        "snapshot_id": hek.snapshot().id,
        "encoder": hek.encoder.id,
        "entries": {level: len(hek.entries(level)) for level in LEVELS},
        "questions": len({question for lesson in lessons for question in lesson.qa_groups}),
        "quarantined_entries": len({row["exp_id"] for row in refused if row["kind"] == "entry"}),
        "rejected_replies": sum(row["kind"] == "reply" for row in refused),
        "words": float(np.mean([len(lesson.description.split()) for lesson in lessons])) if lessons else None,
        "reflectors": {name: _plain(tally) for name, tally in read_ledger(hek).items()},
    }


def _plain(tally: Tally) -> dict[str, float]:
    return {name: getattr(tally, name) for name in Tally.__dataclass_fields__}


def serving(hek: HEK, questions: Sequence[Question]) -> dict[str, Any]:
    """What agents that are asked ``questions`` would be shown at the start.

    Keys: ``questions``, ``leaks`` (entries that give away an answer), per level ``served`` (share of the questions with
    at least one entry; E1 at its calibrated threshold) and ``similarity`` (mean of the best entry's, where served).
    """
    result: dict[str, Any] = {
        "questions": len(questions),
        "leaks": len(leaking_entries(hek.snapshot(), questions)),
        "served": {},
        "similarity": {},
    }
    texts = [question.text for question in questions]
    for level in LEVELS:
        hits = hek.retrieve_many(texts, level=level, top_k=1, exclude_questions=list(questions))
        best = [found[0].score for found in hits if found]
        result["served"][level] = len(best) / len(questions)
        result["similarity"][level] = float(np.mean(best)) if best else None
    return result


def overlap(a: HEK, b: HEK) -> dict[str, float | int | None]:
    """How alike the lessons of ``a`` and ``b`` on the same questions are.

    Keys: ``common_questions``; of those, ``same_text`` (share where a lesson of one has the very description of one of
    the other) and ``similarity`` (mean over questions of the best cosine between descriptions, by the encoder of
    ``a``); None without a common question.
    """
    left, right = _by_question(a), _by_question(b)
    common = sorted(left.keys() & right.keys())
    if not common:
        return {"common_questions": 0, "same_text": None, "similarity": None}
    texts = sorted({lesson.description for side in (left, right) for key in common for lesson in side[key]})
    place = {text: row for row, text in enumerate(texts)}
    vectors = a.encoder.encode(texts)
    same, cosines = [], []
    for key in common:
        rows = [[place[lesson.description] for lesson in side[key]] for side in (left, right)]
        same.append(bool(set(rows[0]) & set(rows[1])))
        cosines.append(float((vectors[rows[0]] @ vectors[rows[1]].T).max()))
    return {"common_questions": len(common), "same_text": float(np.mean(same)), "similarity": float(np.mean(cosines))}


def _by_question(hek: HEK) -> Mapping[str, list[Experience]]:
    found: dict[str, list[Experience]] = {}
    for lesson in hek.entries("E1"):
        for question in lesson.qa_groups:
            found.setdefault(question, []).append(lesson)
    return found
