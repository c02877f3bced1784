"""Miniworld: every question has one answer, every trap is real, the search shows both, names cannot leak."""

from __future__ import annotations

from collections import Counter

import pytest

from hiexp.tasks import miniworld_text as text
from hiexp.tasks.miniworld import MiniWorld
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS


@pytest.fixture(scope="module")
def world() -> MiniWorld:
    return MiniWorld(seed=3, size=16)


def test_families_are_two_directions_of_every_pair():
    assert len(FAMILIES) == 2 * len(PAIRS) == 22
    assert len({family.name for family in FAMILIES}) == 22
    assert len({family.phrase for family in FAMILIES}) == 22


def test_words_of_different_roles_are_disjoint():
    roles = {f"{name}/{i}": set(pool) for name, pools in text.NAME_POOLS.items() for i, pool in enumerate(pools)}
    roles |= {name: set(pool) for name, pool in text.VALUE_POOLS.items()}
    roles["attributes"] = {attribute for pair in PAIRS for attribute in pair.attributes}
    roles["phrases"] = {word for pair in PAIRS for phrase in pair.phrases for word in phrase.split()}
    counts = Counter(word for role in roles.values() for word in role)
    assert [word for word, count in counts.items() if count > 1] == []
    assert all(len(set(pool)) == len(pool) for pools in text.NAME_POOLS.values() for pool in pools)


def test_no_single_phrase_word_is_the_key_of_most_families():
    """A family is told by a combination of words: at least half share each of their words, or all but one."""
    counts = Counter(word for family in FAMILIES for word in set(family.phrase.split()))
    shared = [family for family in FAMILIES if any(counts[word] > 1 for word in family.phrase.split())]
    assert len(shared) >= len(FAMILIES) // 2


def test_questions_are_balanced_distinct_and_answered_by_the_solver(world: MiniWorld):
    questions = world.questions(110, seed=0)
    assert Counter(q.meta["family"] for q in questions) == {family.name: 5 for family in FAMILIES}
    assert len({q.id for q in questions}) == len({q.text for q in questions}) == 110
    for question in questions:
        assert world.solve(question.text) == list(question.golden_answers)
        assert question.meta["trap_answer"] not in question.golden_answers
        assert question.meta["lesson"] == f"look for {question.meta['right']} , not {question.meta['trap']}"
        # The attribute must be learnt, so the question must not name it; nor may it name the answer.
        assert not {question.meta["right"], question.meta["trap"]} & set(question.text.split())
        assert question.golden_answers[0] not in question.text


@pytest.mark.parametrize("named", ["right", "trap"])
def test_search_finds_what_is_named_and_shows_the_other_value_too(world: MiniWorld, named: str):
    for question in world.questions(220, seed=1):
        meta = question.meta
        wanted = question.golden_answers[0] if named == "right" else meta["trap_answer"]
        documents = world.tool.search([f"{meta['entity']} {meta['phrase']} {meta[named]}"], top_k=2)[0]
        assert f"{meta[named]} " in documents[0].text
        assert wanted in documents[0].text
        both = " ".join(document.text for document in documents)
        assert question.golden_answers[0] in both
        assert meta["trap_answer"] in both


def test_half_of_the_films_share_a_title_with_a_play(world: MiniWorld):
    films, plays = set(world.entities["film"]), set(world.entities["play"])
    assert len(films) == len(plays) == 16
    assert len(films & plays) == 8


def test_same_seed_same_world_other_seed_other_facts(world: MiniWorld):
    again, other = MiniWorld(seed=3, size=16), MiniWorld(seed=4, size=16)
    assert again.passages == world.passages
    assert [q.id for q in again.questions(44, seed=5)] == [q.id for q in world.questions(44, seed=5)]
    same = [fact for fact in _facts(world) if fact in set(_facts(other))]
    assert len(same) < 0.01 * len(_facts(world))


def _facts(world: MiniWorld) -> list[tuple[str, str, str, str]]:
    return [(kind, name, a, v) for (kind, name), known in world.facts.items() for a, v in known.items()]


def test_vocabulary_is_closed(world: MiniWorld):
    words = set(MiniWorld.vocabulary())
    spoken = [q.text for q in world.questions(110, seed=2)] + [t for _, t in world.passages]
    assert {word for sentence in spoken for word in sentence.split()} <= words


def test_unknown_sentences_have_no_answer(world: MiniWorld):
    assert world.solve("") == []
    assert world.solve("which year was nobody nowhere first shown") == []
    title = world.entities["play"][0]
    assert world.solve(f"which year was {title}") == []


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="size: expected 2 to 200, got 1"):
        MiniWorld(seed=0, size=1)
    with pytest.raises(ValueError, match="has 44 questions in balance, got n=45"):
        MiniWorld(seed=0, size=2).questions(45, seed=0)


def test_tool_is_deterministic_and_bounded(world: MiniWorld):
    assert world.tool.search([], top_k=2) == []
    assert world.tool.search(["", "zzz"], top_k=2) == [[], []]
    queries = [f"{name} composed" for name in world.entities["play"]]
    first = world.tool.search(queries, top_k=3)
    assert first == MiniWorld(seed=3, size=16).tool.search(queries, top_k=3)
    assert all(len(documents) == 3 for documents in first)


def test_rephrased_questions_have_the_same_answers_and_need_no_new_words(world: MiniWorld):
    questions = world.questions(110, seed=3, wordings=text.REPHRASED)
    assert Counter(q.meta["family"] for q in questions) == {family.name: 5 for family in FAMILIES}
    for question in questions:
        _, _, family, name, wording = question.id.split(":")
        assert int(wording) in text.REPHRASED
        plain = world.question(next(f for f in FAMILIES if f.name == family), name, int(wording) - 2)
        assert question.golden_answers == plain.golden_answers
        assert question.text != plain.text
        assert world.solve(question.text) == list(question.golden_answers)
    phrases = {word for pair in PAIRS for phrase in pair.phrases for word in phrase.split()}
    assert {word for pair in PAIRS for phrase in pair.rephrased for word in phrase.split()} <= phrases
    assert len({family.said(wording) for family in FAMILIES for wording in (0, 2)}) == 2 * len(FAMILIES)


def test_questions_can_be_drawn_from_some_families(world: MiniWorld):
    chosen = FAMILIES[:3]
    assert Counter(q.meta["family"] for q in world.questions(9, 0, chosen)) == {family.name: 3 for family in chosen}
