"""Demonstrations: they follow lessons, ignore others, and leak no truth."""

from __future__ import annotations

import random

import pytest

from hiexp.agent.protocol import get_dialect
from hiexp.tasks.miniworld import MiniWorld
from hiexp.tasks.miniworld_demos import DIALECT, DemonstrationMix, demonstrate
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS

WORLD = MiniWorld(seed=9, size=12)
OTHER = {family.right: family.trap for family in FAMILIES}


def dialogues(mix: DemonstrationMix, n: int = 300) -> list[tuple[str, str, str, str]]:
    """(prompt, first turn, tool response, second turn) of ``n`` demonstrations."""
    found = demonstrate(WORLD, n, random.Random(0), mix=mix)
    return [tuple(segment for segment, _ in one.segments) for one in found]


def named(turn: str) -> str:
    return turn.split()[1]


def lessons(text: str) -> list[str]:
    """What the lesson lines in ``text`` say to look for, in order."""
    words = text.split()
    return [words[i + 2] for i, word in enumerate(words) if word == "look"]


def about(attributes: list[str], named_attribute: str) -> list[str]:
    return [one for one in attributes if one in (named_attribute, OTHER[named_attribute])]


def test_only_turns_of_the_policy_are_imitated():
    for one in demonstrate(WORLD, 20, random.Random(1)):
        assert [own for _, own in one.segments] == [False, True, False, True]


def test_turns_are_in_the_dialect_and_answer_with_the_named_attribute():
    dialect = get_dialect(DIALECT)
    for _, first, response, second in dialogues(DemonstrationMix()):
        search, answer = dialect.parse(first), dialect.parse(second)
        assert search.kind == "search"
        assert search.text.endswith(f" {named(first)}")
        assert answer.kind == "answer"
        assert f"{named(second)} {answer.text}" in response


def test_without_lessons_the_choice_is_a_coin_flip_and_is_kept():
    truth = {family.phrase: family.right for family in FAMILIES}
    hits = 0
    found = dialogues(DemonstrationMix(start=0.0, tool=0.0), n=600)
    for prompt, first, _, second in found:
        assert named(first) == named(second)
        right = next(right for phrase, right in truth.items() if phrase in prompt)
        hits += named(first) == right
    assert 0.42 < hits / len(found) < 0.58  # 4 standard deviations


def test_the_first_matching_lesson_at_the_start_is_followed():
    for prompt, first, _, _ in dialogues(DemonstrationMix(start=1.0, start_matching=1.0, tool=0.0)):
        assert about(lessons(prompt), named(first))[0] == named(first)


def test_a_matching_lesson_in_the_response_decides_the_second_choice():
    changed = 0
    for _, first, response, second in dialogues(DemonstrationMix(start=0.0, tool=1.0, tool_matching=1.0)):
        assert lessons(response) == [named(second)]
        changed += named(first) != named(second)
    assert changed > 100


@pytest.mark.parametrize("mix", [DemonstrationMix(1.0, 0.0, 0.0, 0.0), DemonstrationMix(0.0, 0.0, 1.0, 0.0)])
def test_lessons_about_other_pairs_change_nothing(mix: DemonstrationMix):
    for prompt, first, response, second in dialogues(mix):
        assert about(lessons(prompt + response), named(first)) == []
        assert named(first) == named(second)


def test_lessons_point_both_ways():
    """Within every pair both directions occur about equally often, or the demonstrations would leak the truth."""
    found = [a for prompt, *_ in dialogues(DemonstrationMix(1.0, 1.0, 0.0, 0.0), n=1500) for a in lessons(prompt)]
    for pair in PAIRS:
        first, second = (found.count(attribute) for attribute in pair.attributes)
        assert abs(first - second) < 4 * (first + second) ** 0.5


def test_trapped_demonstrators_prefer_the_trap_and_still_follow_lessons():
    truth = {family.said(wording): family.right for family in FAMILIES for wording in (0, 2)}
    mix = DemonstrationMix(start=0.0, tool=0.0, trapped=0.7, wordings=4)
    found = dialogues(mix, n=600)
    rights = [next(r for phrase, r in truth.items() if f" {phrase} " in f" {prompt} ") for prompt, *_ in found]
    hits = sum(named(first) == right for (_, first, _, _), right in zip(found, rights, strict=True))
    assert 0.09 < hits / len(found) < 0.21  # 0.15, 4 standard deviations
    for prompt, first, _, _ in dialogues(DemonstrationMix(1.0, 1.0, 0.0, 0.0, trapped=1.0)):
        assert about(lessons(prompt), named(first))[0] == named(first)
