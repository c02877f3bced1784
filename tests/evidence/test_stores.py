"""Controls are what they claim: placebo is as long and never to the point, shuffled is the same lines elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hiexp.evidence import stores
from hiexp.evidence.task import STRATA, EvidenceTask
from hiexp.experience.record import Experience
from hiexp.experience.retrieve import Snapshot
from hiexp.experience.store import HEK
from hiexp.quickstart.measures import verdict
from hiexp.rl.warm_start import vocabulary

from .conftest import tiny

TASK = EvidenceTask(tiny(), seed=0)
_, SOURCE = TASK.source()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The true lesson of every source question."""
    with HEK.create(tmp_path_factory.mktemp("hek") / "hek.sqlite") as hek:
        hek.add([Experience("E1", q.text, q.meta["lesson"], qa_groups=(q.id,)) for q in SOURCE])
        hek.add([Experience("E2", q.text, q.meta["lesson"], qa_groups=(q.id,)) for q in SOURCE])
        return hek.snapshot()


def test_placebo_is_as_long_and_about_other_attributes(snapshot: Snapshot):
    placebo = stores.placebo(snapshot, TASK.seen_pairs, seed=0)
    assert placebo.id != snapshot.id
    questions = {question.id: question for question in SOURCE}
    for entry, fake in zip(snapshot.entries, placebo.entries, strict=True):
        assert (fake.exp_id, fake.title, fake.level) == (entry.exp_id, entry.title, entry.level)
        assert len(fake.description.split()) == len(entry.description.split())
        question = questions[entry.qa_groups[0]]
        assert verdict(entry.description, question) == "right"
        assert verdict(fake.description, question) == "other"


def test_shuffled_deals_the_same_lines_out_within_each_level(snapshot: Snapshot):
    dealt = stores.shuffled(snapshot, seed=0)
    for level in ("E1", "E2"):
        lines = [Counter(e.description for e in one.entries if e.level == level) for one in (snapshot, dealt)]
        assert lines[0] == lines[1]
    moved = [a.description != b.description for a, b in zip(snapshot.entries, dealt.entries, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert stores.shuffled(snapshot, seed=0) == dealt != stores.shuffled(snapshot, seed=1)


def test_oracle_serves_the_true_lesson_for_every_family_and_wording():
    oracle = stores.oracle()
    for stratum in STRATA:
        questions = TASK.test[stratum]
        for level, threshold in ((("E2", "E3"), None), ("E1", 0.35)):
            hits = oracle.retrieve_many(
                ["anything"] * len(questions), level=level, top_k=2, threshold=threshold, exclude_questions=questions
            )
            assert [[hit.experience.description for hit in one] for one in hits] == [
                [question.meta["lesson"]] for question in questions
            ]
    assert oracle.retrieve_many(["x"], level="E1", threshold=2.0, exclude_questions=SOURCE[:1]) == [[]]
    with pytest.raises(TypeError, match="expected miniworld Questions, got NoneType"):
        oracle.retrieve_many(["x"], exclude_questions=[None])


def test_oracle_survives_the_copy_that_a_run_pins(tmp_path: Path):
    stores.oracle().write(tmp_path / "oracle.npz")
    assert Snapshot.read(tmp_path / "oracle.npz").id == stores.oracle().id


def test_plain_instruction_is_in_the_vocabulary_and_names_no_attribute():
    (entry,) = stores.plain().entries
    words = entry.description.split()
    assert set(words) <= set(vocabulary())
    assert not {a for pair in TASK.seen_pairs for a in pair.attributes} & set(words)
    hits = stores.plain().retrieve_many([q.text for q in SOURCE], level=("E2", "E3"), top_k=2)
    assert all([hit.experience.exp_id for hit in one] == ["plain"] for one in hits)
