"""Summaries are not paid for twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hiexp.experience.distill import RejectedReply
from hiexp.experience.record import Experience, Level
from hiexp.experience.remember import RememberedSummaries
from hiexp.experience.store import HEK
from hiexp.io import DataError


class Summariser:
    """Counts what it was asked; fails from ``fail_at`` on; ``refuse``: falls back after a reply of no use."""

    id = "counting"

    def __init__(self, fail_at: int = 10**9, refuse: bool = False) -> None:
        self.asked, self.fail_at, self.refuse = 0, fail_at, refuse
        self.rejected: list[RejectedReply] = []

    def summarise(self, children: Sequence[Experience], level: Level) -> Experience | None:
        if self.asked >= self.fail_at:
            raise ConnectionError("the model went away")
        self.asked += 1
        if self.refuse:
            self.rejected.append(RejectedReply("raw", "no JSON", "", ()))
        if level == "E3":
            return None
        return Experience(level, children[0].title, f"of {len(children)}: {children[0].description}", tags=("süß",))


@pytest.fixture
def hek(tmp_path: Path):
    with HEK.create(tmp_path / "hek.sqlite") as hek:
        kinds = ("when was the play {} composed", "where was the painter {} born", "who leads the guild of {}")
        hek.add([
            Experience("E1", kind.format(name), f"lesson {name} {place}", qa_groups=(f"q{place}{name}",))
            for place, kind in enumerate(kinds) for name in ("Ada", "Bela", "Cato")
        ])  # fmt: skip
        yield hek


def build(hek: HEK, inner: Summariser, name: str = "openai:t") -> RememberedSummaries:
    summaries = RememberedSummaries(inner, name, hek.path.with_name("hek.sqlite.summaries.jsonl"))
    hek.build_hierarchy(summariser=summaries, thresholds={"E2": 1.0, "E3": 1.4})
    return summaries


def test_a_killed_build_goes_on_where_it_stopped(hek: HEK) -> None:
    with pytest.raises(ConnectionError):
        build(hek, Summariser(fail_at=2))
    assert not hek.entries("E2")
    second = Summariser()
    summaries = build(hek, second)
    assert summaries.remembered == 2
    made = hek.snapshot().id
    third = Summariser(fail_at=0)
    assert build(hek, third).remembered == second.asked + 2
    assert hek.snapshot().id == made
    assert {entry.tags for entry in hek.entries("E2")} == {("süß",)}


def test_another_model_or_another_cluster_is_asked_again(hek: HEK) -> None:
    first = Summariser()
    build(hek, first)
    other = Summariser()
    assert build(hek, other, "openai:u").remembered == 0
    assert other.asked == first.asked
    hek.add([Experience("E1", "when was the play Dora composed", "lesson Dora 0", qa_groups=("q0Dora",))])
    changed = Summariser()
    build(hek, changed)
    assert 0 < changed.asked < first.asked


def test_what_was_said_instead_of_a_rejected_reply_is_not_kept(hek: HEK) -> None:
    refusing = Summariser(refuse=True)
    build(hek, refusing)
    again = Summariser()
    assert build(hek, again).remembered == 0
    assert again.asked == refusing.asked


def test_a_torn_line_is_dropped_and_a_damaged_one_named(hek: HEK) -> None:
    build(hek, Summariser())
    file = hek.path.with_name("hek.sqlite.summaries.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    again = Summariser()
    build(hek, again)
    assert again.asked == 1
    assert file.read_bytes() == b"".join(lines)
    file.write_bytes(b"{\n" + lines[0])
    with pytest.raises(DataError, match=r"summaries\.jsonl:1: not valid JSON"):
        build(hek, Summariser())
