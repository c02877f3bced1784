"""The HEK's content: append-only revisions, deduplication, quarantine, snapshots."""

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.experience.prompt import render_start, render_tool
from hiexp.experience.record import STATUSES, new_exp_id
from hiexp.experience.store import HEK
from hiexp.tasks.question import Question

from .conftest import lesson

# ------------------------------------------------------------------ adding


def test_added_entries_come_back_from_the_file(path, hek):
    stored = hek.add([lesson(i, tags=("t",), thinking="why", policy_step=3, meta={"a": [1]}) for i in range(5)])
    assert [entry.rev for entry in stored] == [1] * 5
    assert len({entry.exp_id for entry in stored}) == 5
    hek.close()
    with HEK.open(path) as again:
        assert list(again) == sorted(stored, key=lambda entry: entry.exp_id)
        assert len(again) == 5
        assert again.get(stored[2].exp_id) == stored[2]
        assert again.entries_from("q3/0/2") == [stored[3]]
        assert again.retrieve("when did play 2 open", top_k=1)[0].experience == stored[2]


def test_ids_are_the_same_in_every_run_and_differ_by_content_and_source():
    assert new_exp_id(lesson(1)) == new_exp_id(lesson(1, thinking="other", meta={"x": 1}))
    others = [lesson(2), lesson(1, tags=("t",)), lesson(1, sources=("s",)), lesson(1, level="E2")]
    assert len({new_exp_id(entry) for entry in [lesson(1), *others]}) == 5


def test_an_equal_lesson_joins_the_first_one(hek):
    first = hek.add([lesson(1)])[0]
    twin = lesson(1, qa_groups=("q9",), sources=("q1/0/1", "q9/0/0"), thinking="another reason")
    second = hek.add([twin])[0]
    assert (second.exp_id, second.rev) == (first.exp_id, 2)
    assert second.qa_groups == ("q1", "q9")
    assert second.sources == ("q1/0/1", "q1/0/2", "q9/0/0")
    assert second.thinking == first.thinking
    assert len(hek) == 1
    # Nothing new: nothing written.
    assert hek.add([twin, lesson(1)]) == [second, second]
    assert [entry.rev for entry in hek.revisions(first.exp_id)] == [1, 2]


def test_equal_lessons_in_one_call(hek):
    assert hek.add([lesson(1), lesson(1, sources=("s",))])[1].rev == 2
    assert len(hek) == 1


def test_a_retired_lesson_found_again_stays_retired(hek):
    entry = hek.add([lesson(1)])[0]
    hek.revise(entry.exp_id, status="retired")
    assert hek.add([lesson(1, sources=("s",))])[0].status == "retired"
    assert len(hek) == 0
    assert hek.entries(status="retired")[0].sources[-1] == "s"


def test_a_batch_is_stored_whole_or_not_at_all(hek):
    with pytest.raises(ValueError, match="level: expected one of E1, E2, E3, got 'E9'"):
        hek.add([lesson(1), lesson(2, level="E9")])
    taken = hek.add([lesson(5)])[0].exp_id
    with pytest.raises(ValueError, match="exists with other content"):
        hek.add([lesson(6), lesson(7, exp_id=taken)])
    assert [entry.title for entry in hek] == [lesson(5).title]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"title": None}, TypeError, "title: expected text, got NoneType"),
        ({"tags": ["a"]}, TypeError, "tags: expected a tuple of strings, got list"),
        ({"sources": (3,)}, TypeError, "sources: expected text, got int"),
        ({"status": "live"}, ValueError, "status: expected one of quarantine, .* got 'live'"),
        ({"meta": {"a": object()}}, TypeError, "meta: expected values that JSON can hold"),
        ({"description": "\ud800"}, ValueError, "description: not valid Unicode: a lone surrogate at position 0"),
    ],
)
def test_bad_fields(hek, fields, error, message):
    with pytest.raises(error, match=message):
        hek.add([lesson(1, **fields)])
    with pytest.raises(TypeError, match="expected a list of Experience, got one Experience"):
        hek.add(lesson(1))
    with pytest.raises(TypeError, match="expected an Experience, got dict"):
        hek.add([{"title": "x"}])


# ------------------------------------------------------------------ revisions

changes = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.one_of(
            st.builds(lambda text: {"description": text}, st.sampled_from(["a lesson", "another lesson", "<|bad|>"])),
            st.builds(lambda status: {"status": status}, st.sampled_from(STATUSES)),
            st.builds(lambda title: {"title": title}, st.sampled_from(["first title", "second title"])),
            st.builds(lambda source: {"sources": (source,)}, st.sampled_from(["a", "b"])),
        ),
    ),
    max_size=12,
)


@given(changes)
@settings(max_examples=25, deadline=None)
def test_revisions_are_only_ever_appended(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("hek") / "hek.sqlite"
    with HEK.create(path, encoder="hashing:16") as hek:
        ids = [entry.exp_id for entry in hek.add([lesson(i) for i in range(4)])]
        written = {exp_id: hek.revisions(exp_id) for exp_id in ids}
        for which, change in edits:
            before = hek.get(ids[which])
            after = hek.revise(ids[which], **change)
            assert after.rev == before.rev + (after != before)
            for exp_id in ids:
                now = hek.revisions(exp_id)
                assert now[: len(written[exp_id])] == written[exp_id]
                assert [entry.rev for entry in now] == list(range(1, len(now) + 1))
                written[exp_id] = now
        served = {entry.exp_id for entry in hek.snapshot().entries}
        assert served == {exp_id for exp_id in ids if written[exp_id][-1].status == "active"}


def test_the_database_itself_refuses_to_change_a_revision(path, hek):
    hek.add([lesson(1)])
    hek.close()
    connection = sqlite3.connect(path)
    for statement in ("UPDATE revisions SET status = 'retired'", "DELETE FROM revisions"):
        with pytest.raises(sqlite3.IntegrityError, match=r"^revisions are append-only$"):
            connection.execute(statement)
    connection.close()


def test_what_cannot_be_revised(hek):
    entry = hek.add([lesson(1)])[0]
    with pytest.raises(ValueError, match="revise: level, rev of an entry cannot be changed"):
        hek.revise(entry.exp_id, level="E2", rev=7)
    with pytest.raises(TypeError):
        hek.revise(entry.exp_id, colour="red")
    with pytest.raises(KeyError, match="no entry 'e1-nothing'"):
        hek.revise("e1-nothing", status="retired")
    with pytest.raises(KeyError, match="no revision 2"):
        hek.get(entry.exp_id, rev=2)


# ------------------------------------------------------------------ guard and quarantine

CANARY = "Zanzibarite Kolmogor"


def test_a_canary_answer_never_reaches_a_prompt(hek):
    hek.register_questions([Question("q1", "Who owned the ship?", (CANARY,))])
    hek.add(
        [
            lesson(1, description=f"the answer is {CANARY}"),
            lesson(2, title=f"About {CANARY}?"),
            lesson(3, thinking=f"because of {CANARY.upper()}"),
            lesson(4, tags=(CANARY,)),
            lesson(5, level="E2", description=f"look for {CANARY.lower()}"),
            *(lesson(i) for i in range(6, 10)),
        ]
    )
    hits = hek.retrieve(f"{CANARY} when did play 1 open", top_k=50, threshold=-1.0)
    assert len(hits) == 4
    shown = render_start(hits) + "".join(render_tool(hit) for hit in hits)
    assert "zanzibarite" not in shown.casefold()
    assert len(hek.entries(status="quarantine")) == 5
    assert {row["kind"] for row in hek.quarantined()} == {"entry"}
    assert all("gold answer" in row["reason"] for row in hek.quarantined())
    assert hek.entries(status="quarantine")[0].meta["quarantine_reason"] in {r["reason"] for r in hek.quarantined()}


def test_gold_answers_are_not_in_the_file(path, hek):
    hek.register_questions([Question("q1", "Who owned the ship?", (CANARY,))])
    hek.close()
    assert CANARY.split()[0].casefold().encode() not in path.read_bytes().lower()


def test_answers_registered_later_are_checked_against_what_is_there(hek):
    leaking, clean = hek.add([lesson(1, description="go to Blue Lake"), lesson(2)])
    assert hek.register_answers(["Blue Lake"]) == [hek.get(leaking.exp_id)]
    assert hek.get(leaking.exp_id).status == "quarantine"
    assert list(hek) == [clean]
    assert hek.register_answers(["Blue Lake"]) == []


def test_quarantine_is_left_only_through_the_guard(hek):
    entry = hek.add([lesson(1, description="use <|im_start|>")])[0]
    assert hek.revise(entry.exp_id, status="active").status == "quarantine"
    mended = hek.revise(entry.exp_id, status="active", description="use the index")
    assert mended.status == "active"
    assert hek.retrieve(mended.title, level="E1", threshold=-1.0)[0].experience == mended


def test_a_rolled_back_answer_is_forgotten(hek):
    hek.add([lesson(1)])

    def fail_half_way():
        with hek.transaction():
            hek.register_answers(["Blue Lake"])
            assert hek.guard.check(lesson(2, description="go to Blue Lake")) is not None
            hek.add([3])

    with pytest.raises(TypeError, match="got int"):
        fail_half_way()
    assert hek.add([lesson(2, description="go to Blue Lake")])[0].status == "active"


def test_raw_replies_are_kept(hek):
    hek.quarantine_reply("{not json", "not valid JSON", {"question_id": "q1"})
    (row,) = hek.quarantined()
    assert (row["kind"], row["reason"], row["exp_id"]) == ("reply", "not valid JSON", None)
    assert "{not json" in row["body"]
    assert len(hek) == 0


# ------------------------------------------------------------------ snapshots


def test_snapshots_pin_what_was_active(hek):
    hek.add([lesson(i) for i in range(3)])
    before = hek.snapshot()
    assert hek.snapshot() is before
    extra = hek.add([lesson(7)])[0]
    after = hek.snapshot()
    assert len(before) == 3
    assert len(after) == 4
    hek.revise(extra.exp_id, status="shadow")
    assert hek.snapshot().entries == before.entries
    assert hek.snapshot().id == before.id


def test_equal_content_gives_an_equal_id_whatever_the_order_of_batches(tmp_path):
    ids = set()
    for name, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 0, 2])):
        with HEK.create(tmp_path / name, encoder="hashing:64") as hek:
            for i in order:
                hek.add([lesson(i)])
            ids.add(hek.snapshot().id)
    assert len(ids) == 1


def test_a_reader_sees_what_the_writer_commits(path, hek):
    with HEK.open(path) as reader:
        assert len(reader) == 0
        hek.add([lesson(1)])
        assert reader.snapshot() == hek.snapshot()
        with hek.transaction():
            hek.add([lesson(2)])
            assert len(reader) == 1
        assert len(reader.snapshot()) == 2
