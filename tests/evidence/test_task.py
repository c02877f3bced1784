"""Which families are seen, and by whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiexp.evidence.task import STRATA, EvidenceTask
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS

from .conftest import tiny


@pytest.fixture(scope="module")
def task() -> EvidenceTask:
    return EvidenceTask(replace(tiny(), test_reworded=16, test_unseen=12), seed=3)


def families(questions) -> set[str]:
    return {question.meta["family"] for question in questions}


def wordings(questions) -> set[int]:
    return {int(question.id.rsplit(":", 1)[1]) for question in questions}


def test_unseen_pairs_never_occur_in_source_or_training(task: EvidenceTask):
    unseen = {family.name for family in task.unseen}
    assert len(unseen) == 2 * task.config.unseen_pairs
    assert unseen | {family.name for family in task.seen} == {family.name for family in FAMILIES}
    _, source = task.source()
    trained = [question for step in range(1, 9) for question in task.training(step, 16).questions]
    for questions in (source, trained):
        assert families(questions) == {family.name for family in task.seen}
        assert wordings(questions) == {0, 1}


def test_strata_are_what_they_are_called(task: EvidenceTask):
    seen, reworded, unseen = (task.test[stratum] for stratum in STRATA)
    assert families(seen) == families(reworded) == {family.name for family in task.seen}
    assert families(unseen) == {family.name for family in task.unseen}
    assert wordings(seen) | wordings(unseen) == {0, 1}
    assert wordings(reworded) == {2, 3}
    (batch,) = task.evaluation()
    assert [one.id for one in batch.questions] == [one.id for one in (*seen, *reworded, *unseen)]
    assert len({one.id for one in batch.questions}) == len(batch.questions)


def test_seeds_draw_other_unseen_pairs_and_steps_other_worlds(task: EvidenceTask):
    drawn = {EvidenceTask(tiny(), seed).unseen for seed in range(6)}
    assert len(drawn) > 1
    assert all(len({family.pair for family in one}) == 3 < len(PAIRS) for one in drawn)
    first, second = (task.training(step, 4).tool.documents[0].text for step in (1, 2))
    assert first != second
    again = EvidenceTask(tiny(), seed=3)
    assert [q.id for q in again.training(1, 4).questions] == [q.id for q in task.training(1, 4).questions]


def test_all_questions_of_training_and_test_are_known_to_the_guard(task: EvidenceTask):
    known = {question.id for question in task.known_questions()}
    run = task.config.train.run
    for step in range(1, run.steps + 1):
        assert {question.id for question in task.training(step, run.questions_per_step).questions} <= known
    assert {question.id for stratum in STRATA for question in task.test[stratum]} <= known
