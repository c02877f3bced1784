"""Miniworld: a small world of artists, films, plays and guilds, generated from a seed, to search in and be trapped by.

Why: a search agent that can be trained in minutes on two CPU cores, with everything known that real data hides: the one
right answer (by a solver), the trap of every question and the lesson that avoids it. Half of the films share their
title with a play. Worlds of different seeds share words, never facts.

    world = MiniWorld(seed=1)
    questions = world.questions(64, seed=0)     # Question.meta holds family, right, trap and lesson
    documents = world.tool.search(["silent harbor premiere"], top_k=2)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property

from hiexp.tasks import miniworld_text as text
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS, PHRASED, REPHRASED, Family, Kind
from hiexp.tasks.miniworld_tool import MiniWorldTool
from hiexp.tasks.question import Question

_ARTICLE: dict[Kind, str] = {"artist": "an", "film": "a", "play": "a", "guild": "a"}


class MiniWorld:
    """One world.

    Args:
        seed: decides every name, fact and sentence.
        size: number of artists, of films and of plays; guilds are half as many. 2 to 200 (guild names run out above).
    """

    def __init__(self, seed: int, size: int = 20) -> None:
        if not 2 <= size <= 200:
            raise ValueError(f"size: expected 2 to 200, got {size}")
        self.seed, self.size = seed, size
        # A string seeds through SHA-512, so that neighbouring seeds give unrelated worlds.
        rng = random.Random(f"miniworld/{seed}/{size}")
        films = _names("title", size, rng)
        shared = films[: size // 2]
        plays = (
            shared + [name for name in _names("title", 2 * size, rng) if name not in set(films)][: size - len(shared)]
        )
        self.entities: dict[Kind, list[str]] = {
            "artist": _names("artist", size, rng),
            "film": films,
            "play": plays,
            "guild": _names("guild", max(1, size // 2), rng),
        }
        self.facts: dict[tuple[Kind, str], dict[str, str]] = {
            (kind, name): {} for kind, names in self.entities.items() for name in names
        }
        for pair in PAIRS:
            self._add_facts(pair, rng)
        self.passages = list(self._write_passages(rng))

    def _add_facts(self, pair: text.Pair, rng: random.Random) -> None:
        """Give both attributes of ``pair`` to all entities that have them, never with equal values side by side."""
        for kind in dict.fromkeys(pair.kinds):
            for name in self.entities[kind]:
                taken = {
                    self.facts[kind_, name].get(a)
                    for kind_ in pair.kinds
                    if (kind_, name) in self.facts
                    for a in pair.attributes
                }
                for attribute, owner in zip(pair.attributes, pair.kinds, strict=True):
                    if owner == kind:
                        pool = [value for value in text.VALUE_POOLS[pair.value] if value not in taken]
                        value = rng.choice(pool)
                        taken.add(value)
                        self.facts[kind, name][attribute] = value

    def _write_passages(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Yield (title, text): one passage per entity and pair, both facts in random order and wording.

        Passages about shared names come first: the tool breaks ties by this order, so that a search for a title which
        is both a film and a play shows the other one, too.
        """
        for pair in PAIRS:
            for kind in dict.fromkeys(pair.kinds):
                for name in self.entities[kind]:
                    known = self.facts[kind, name]
                    facts = [
                        rng.choice(text.FACT_FRAMES).format(a=a, v=known[a]) for a in pair.attributes if a in known
                    ]
                    rng.shuffle(facts)
                    yield name, f"{name} , {_ARTICLE[kind]} {kind} , {' , '.join(facts)}"

    @cached_property
    def tool(self) -> MiniWorldTool:
        """The search tool over this world's articles."""
        return MiniWorldTool(self.passages, prefix=f"miniworld:{self.seed}")

    def subjects(self, family: Family) -> list[str]:
        """Names that a question of ``family`` can be about: those for which the trap exists."""
        first, second = (self.entities[kind] for kind in family.pair.kinds)
        return [name for name in first if name in set(second)]

    def question(self, family: Family, name: str, wording: int) -> Question:
        """The question of ``family`` about ``name`` in one of its wordings (0 to 3), its answer found by the solver."""
        sentence = family.sentence(name, wording)
        answers = self.solve(sentence)
        if len(answers) != 1:
            raise RuntimeError(f"miniworld bug: {sentence!r} has the answers {answers}")
        trap_kind = family.pair.kinds[1 - family.direction]
        meta = {
            "family": family.name, "kind": family.pair.trap, "right": family.right, "trap": family.trap,
            "lesson": family.lesson, "entity": name, "phrase": family.said(wording),
            "trap_answer": self.facts[trap_kind, name][family.trap],
        }  # fmt: skip
        return Question(f"miniworld:{self.seed}:{family.name}:{name}:{wording}", sentence, (answers[0],), meta)

    def questions(
        self, n: int, seed: int, families: Sequence[Family] = FAMILIES, wordings: Sequence[int] = PHRASED
    ) -> list[Question]:
        """Draw ``n`` different questions, ``families`` in turn so that each block of them holds every family once.

        Raises:
            ValueError: the world has fewer than ``n`` questions when all families are used equally.
        """
        rng = random.Random(f"questions/{self.seed}/{seed}")
        stock: dict[str, list[tuple[str, int]]] = {}
        for family in families:
            cases = [(name, wording) for name in self.subjects(family) for wording in wordings]
            stock[family.name] = rng.sample(cases, len(cases))
        most = len(families) * min(len(cases) for cases in stock.values())
        if n > most:
            raise ValueError(f"n: a world of size {self.size} has {most} questions in balance, got n={n}")
        chosen: list[Question] = []
        while len(chosen) < n:
            order = rng.sample(families, len(families))
            chosen += [self.question(family, *stock[family.name].pop()) for family in order]
        return chosen[:n]

    def solve(self, sentence: str) -> list[str]:
        """All answers that the facts give to a question, read from its text alone; empty if it is not understood."""
        answers = set()
        for family in FAMILIES:
            for wording in (*PHRASED, *REPHRASED):
                before, after = family.sentence("|", wording).split("|")
                if sentence.startswith(before) and sentence.endswith(after):
                    name = sentence[len(before) : len(sentence) - len(after)]
                    fact = self.facts.get((family.pair.kinds[family.direction], name), {}).get(family.right)
                    answers.update([fact] if fact is not None else [])
        return sorted(answers)

    @staticmethod
    def vocabulary() -> list[str]:
        """Every word of every world."""
        return text.vocabulary()


def _names(pool: str, n: int, rng: random.Random) -> list[str]:
    """``n`` different two-word names of a pool."""
    first, last = text.NAME_POOLS[pool]
    return [f"{first[i // len(last)]} {last[i % len(last)]}" for i in rng.sample(range(len(first) * len(last)), n)]
