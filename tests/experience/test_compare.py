"""HEKs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiexp.experience.compare import describe, overlap, serving
from hiexp.experience.ledger import Tally, add_to_ledger
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.tasks.question import Question


def make(path: Path, lessons: dict[str, str]) -> HEK:
    hek = HEK.create(path)
    hek.add([
        Experience("E1", f"when was the play {question} composed", text, qa_groups=(question,))
        for question, text in lessons.items()
    ])  # fmt: skip
    return hek


def test_what_is_in_a_hek(tmp_path: Path) -> None:
    with make(tmp_path / "a.sqlite", {"q1": "look for composed", "q2": "look for two words more"}) as hek:
        hek.add([Experience("E1", "bad", "say <|im_start|>")])
        hek.quarantine_reply("raw", "no JSON")
        add_to_ledger(hek, "extractive", Tally(lessons=2, seconds=1.5))
        found = describe(hek)
    assert found["entries"] == {"E1": 2, "E2": 0, "E3": 0}
    assert (found["questions"], found["quarantined_entries"], found["rejected_replies"]) == (2, 1, 1)
    assert found["words"] == 4.0
    assert found["reflectors"]["extractive"]["seconds"] == 1.5


def test_overlap_looks_at_common_questions_only(tmp_path: Path) -> None:
    with (
        make(tmp_path / "a.sqlite", {"q1": "look for composed", "q2": "read the page again", "q3": "x y"}) as a,
        make(tmp_path / "b.sqlite", {"q1": "look for composed", "q2": "ask another question", "q4": "x y"}) as b,
        make(tmp_path / "c.sqlite", {"q9": "look for composed"}) as c,
    ):
        both = overlap(a, b)
        assert both["common_questions"] == 2
        assert both["same_text"] == 0.5
        assert both["similarity"] == pytest.approx(overlap(b, a)["similarity"])
        assert 0.4 < both["similarity"] < 1.0
        assert overlap(a, c) == {"common_questions": 0, "same_text": None, "similarity": None}


def test_serving_leaves_out_a_questions_own_lessons_and_counts_leaks(tmp_path: Path) -> None:
    own = Question("q1", "when was the play q1 composed", ("1900",))
    other = Question("q7", "when was the play q1 composed , really", ("Graz",))
    with make(tmp_path / "a.sqlite", {"q1": "look for composed , in Graz"}) as hek:
        found = serving(hek, [own, other])
    assert found["served"]["E1"] == 0.5
    assert found["served"]["E2"] == 0.0
    assert found["similarity"]["E2"] is None
    assert found["leaks"] == 1
