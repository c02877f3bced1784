"""What the arms are shown besides their own HEK: placebo, shuffled, oracle and plain instruction, as snapshots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hiexp.experience.encoder import make_encoder
from hiexp.experience.record import LEVELS, Experience, Level
from hiexp.experience.retrieve import Hit, Snapshot
from hiexp.tasks.miniworld_text import FAMILIES, Pair
from hiexp.tasks.question import Question

# General advice in the words of the closed vocabulary; it names no attribute.
PLAIN_INSTRUCTION = "look for that which was really first , not for that which once was"


def placebo(snapshot: Snapshot, pairs: Sequence[Pair], seed: int) -> Snapshot:
    """``snapshot`` with every attribute replaced by one of another pair: as long, as well-formed, never to the point.

    The pairs are arranged in a ring, and each passes its lessons on to the next.
    """
    ring = random.Random(f"placebo/{seed}").sample(list(pairs), len(pairs))
    words = {
        old: new
        for pair, following in zip(ring, [*ring[1:], ring[0]], strict=True)
        for old, new in zip(pair.attributes, following.attributes, strict=True)
    }
    return _with_descriptions(
        snapshot,
        [" ".join(words.get(word, word) for word in entry.description.split()) for entry in snapshot.entries],
    )


def shuffled(snapshot: Snapshot, seed: int) -> Snapshot:
    """``snapshot`` with the descriptions of each level dealt out anew: right lessons, wrong questions."""
    rng = random.Random(f"shuffled/{seed}")
    descriptions = [entry.description for entry in snapshot.entries]
    for level in LEVELS:
        places = [i for i, entry in enumerate(snapshot.entries) if entry.level == level]
        for place, other in zip(places, rng.sample(places, len(places)), strict=True):
            descriptions[place] = snapshot.entries[other].description
    return _with_descriptions(snapshot, descriptions)


def oracle() -> Snapshot:
    """The true lesson of every family, seen or not, whatever the wording: an upper bound that no retrieval reaches."""
    entries = [
        Experience(level, f"{family.name} {level}", family.lesson, exp_id=f"oracle-{level}-{family.name}", rev=1)
        for level in ("E1", "E2")
        for family in FAMILIES
    ]
    return _OracleSnapshot(**_parts(entries))


def plain() -> Snapshot:
    """One strategy for all questions."""
    return Snapshot(**_parts([Experience("E3", "plain instruction", PLAIN_INSTRUCTION, exp_id="plain", rev=1)]))


def _parts(entries: Sequence[Experience]) -> dict[str, Any]:
    encoder = make_encoder("hashing")
    ordered = sorted(entries, key=lambda entry: entry.exp_id)
    return {
        "entries": tuple(ordered),
        "embeddings": encoder.encode([entry.title for entry in ordered]),
        "encoder_id": encoder.id,
        "encoder_spec": encoder.spec,
        "thresholds": {"E1": 0.0, "E2": 1.0, "E3": 1.0},
    }


class _OracleSnapshot(Snapshot):
    """Serves by the question's latent family, which only an embedded world knows, instead of by similarity."""

    def retrieve_many(
        self,
        texts: Sequence[str],
        *,
        level: str | Sequence[str] = LEVELS,
        top_k: int = 5,
        threshold: float | None = None,
        exclude_questions: Sequence[str | Question | None] | None = None,
    ) -> list[list[Hit]]:
        """The lesson of each question in ``exclude_questions``; nothing above a threshold of 1."""
        served: Level = "E1" if level == "E1" else "E2"
        if threshold is not None and threshold > 1.0:
            return [[] for _ in texts]
        by_family = {entry.exp_id: entry for entry in self.entries}
        found = []
        for question in exclude_questions or []:
            if not isinstance(question, Question):
                raise TypeError(f"exclude_questions: expected miniworld Questions, got {type(question).__name__}")
            found.append([Hit(by_family[f"oracle-{served}-{question.meta['family']}"], 1.0)])
        return found


def _with_descriptions(snapshot: Snapshot, descriptions: Sequence[str]) -> Snapshot:
    entries = tuple(
        replace(entry, description=description)
        for entry, description in zip(snapshot.entries, descriptions, strict=True)
    )
    return Snapshot(
        entries, snapshot.embeddings, snapshot.encoder_id, snapshot.encoder_spec, dict(snapshot.thresholds),
        dict(snapshot.aliases), snapshot.template,
    )  # fmt: skip
