"""Demonstrations of miniworld dialogues, from which a policy learns to search and to *read* lessons, but no lesson.

A demonstrator names an attribute, searches for it, names an attribute again and answers with its value. Naming comes
first because otherwise the choice stays hidden in the answer: contrast finds nothing to blame and lessons nothing to
change. Which attribute it names is a coin flip between the right one and the trap, unless a lesson line about just
these two attributes is in sight; then it follows the lesson (the first such line, and at the second choice the line
that came with the documents). Directions of lessons are random, too: a demonstration never tells which attribute a
question means.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hiexp.agent.protocol import Dialect, get_dialect
from hiexp.tasks.miniworld import MiniWorld
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS, PHRASED, Family, Pair

DIALECT = "hiexp_compact"
# Words of lesson lines as experiences are written and rendered.
LESSON_WORDS = ("look", "for", "not")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One dialogue as text segments; ``(text, True)`` is what the policy says, ``(text, False)`` what it is given."""

    segments: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class DemonstrationMix:
    """How often demonstrations hold lesson lines.

    Attributes:
        start: share with lines at the start. start_matching: share of those in which a line is about the question's
        pair.
        tool: share with a line in the tool response. tool_matching: share of those that are about the question's pair.
        most_lines: most lines at the start.
        trapped: share of the choices without a lesson that fall for the trap outright; the others are a coin flip.
        Above 0 the demonstrations do tell which attribute a question means, by preferring the other one.
        wordings: questions are asked in the first so many wordings.
    """

    start: float = 0.85
    start_matching: float = 0.85
    tool: float = 0.6
    tool_matching: float = 0.8
    most_lines: int = 2
    trapped: float = 0.0
    wordings: int = len(PHRASED)


def lesson(pair: Pair, direction: int) -> str:
    """The description of a lesson about ``pair``, in the words of the extractive reflector."""
    return Family(pair, direction).lesson


def demonstrate(
    world: MiniWorld, n: int, rng: random.Random, *, top_k: int = 2, mix: DemonstrationMix | None = None
) -> Iterator[Demonstration]:
    """Yield ``n`` demonstrations about ``world``."""
    mix, dialect = mix or DemonstrationMix(), get_dialect(DIALECT)
    for _ in range(n):
        family = rng.choice(FAMILIES)
        yield _demonstration(world, family, rng, dialect, top_k, mix)


def _demonstration(
    world: MiniWorld, family: Family, rng: random.Random, dialect: Dialect, top_k: int, mix: DemonstrationMix
) -> Demonstration:
    pair = family.pair
    question = world.question(family, rng.choice(world.subjects(family)), rng.randrange(mix.wordings))
    lines, first = _start_lines(pair, rng, mix)
    line, second = _tool_line(pair, rng, mix)
    direction = _untold(family, rng, mix) if first is None else first
    revised = direction if second is None else second
    name, kind = question.meta["entity"], pair.kinds[revised]
    query = f"{name} {question.meta['phrase']} {pair.attributes[direction]}"
    value = world.facts[kind, name][pair.attributes[revised]]
    return Demonstration((
        (prompt_text(dialect, question.text, lines), False),
        (f"<think> {pair.attributes[direction]} </think> <tool_call> {query} </tool_call>", True),
        (dialect.format_documents(world.tool.search([query], top_k)[0], line), False),
        (f"<think> {pair.attributes[revised]} </think> \\boxed{{ {value} }}", True),
    ))  # fmt: skip


def _untold(family: Family, rng: random.Random, mix: DemonstrationMix) -> int:
    """The choice of a demonstrator who was told nothing about the pair."""
    if mix.trapped and rng.random() < mix.trapped:
        return 1 - family.direction
    return rng.randrange(2)


def prompt_text(dialect: Dialect, question: str, lines: Sequence[str]) -> str:
    """The prompt as the agent writes it, with lesson lines."""
    return dialect.build_prompt(question, " ; ".join(lines) or None)


def _start_lines(pair: Pair, rng: random.Random, mix: DemonstrationMix) -> tuple[list[str], int | None]:
    """Lesson lines for the start and the direction that the first one about ``pair`` points in."""
    if rng.random() >= mix.start:
        return [], None
    others = [other for other in PAIRS if other is not pair]
    about = [rng.choice(others) for _ in range(rng.randint(1, mix.most_lines))]
    if rng.random() < mix.start_matching:
        # Now and then a second line contradicts the first: the first is the nearer one and wins.
        for slot in rng.sample(range(len(about)), rng.randint(1, len(about))):
            about[slot] = pair
    directions = [rng.randrange(2) for _ in about]
    followed = next((d for p, d in zip(about, directions, strict=True) if p is pair), None)
    return [lesson(p, d) for p, d in zip(about, directions, strict=True)], followed


def _tool_line(pair: Pair, rng: random.Random, mix: DemonstrationMix) -> tuple[str | None, int | None]:
    if rng.random() >= mix.tool:
        return None, None
    direction = rng.randrange(2)
    if rng.random() < mix.tool_matching:
        return lesson(pair, direction), direction
    return lesson(rng.choice([other for other in PAIRS if other is not pair]), direction), None
