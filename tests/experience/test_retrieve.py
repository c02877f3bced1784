"""Retrieval equals brute force in any circumstance; snapshots are immutable, named by content, and travel as files."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiexp
from hiexp.experience import index as index_module
from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.guard import text_key
from hiexp.experience.record import LEVELS, Experience
from hiexp.experience.retrieve import Snapshot
from hiexp.io import DataError
from hiexp.tasks.question import Question

ENCODER = HashingEncoder(32)  # few dimensions: many near ties
TITLES = ["blue lake", "red hill", "blue hill", "green lake", "who wrote it", "when was it", "lake of blue"]


def make_snapshot(entries, encoder=ENCODER, **changes):
    # A description "d" stands for one that no other entry has.
    entries = tuple(
        replace(
            entry,
            exp_id=entry.exp_id or f"x{i:04d}",
            description=entry.description if entry.description != "d" else f"d{i}",
            rev=1,
        )
        for i, entry in enumerate(entries)
    )
    fields = {
        "entries": entries,
        "embeddings": encoder.encode([entry.title for entry in entries]),
        "encoder_id": encoder.id,
        "encoder_spec": encoder.spec,
        "thresholds": {"E1": 0.3, "E2": 1.2, "E3": 1.3},
    }
    return Snapshot(**(fields | changes))


def brute_force(snapshot, text, levels, top_k, threshold, question):
    """The obvious version, in float64 and plain Python."""
    query = ENCODER.encode([text])[0].astype(np.float64)
    hits = []
    for entry, row in zip(snapshot.entries, snapshot.embeddings, strict=True):
        score = round(float((row.astype(np.float64) * query).sum()), 6)
        least = threshold if threshold is not None else (snapshot.thresholds["E1"] if entry.level == "E1" else -1.0)
        own = question in entry.qa_groups if entry.level == "E1" else set(entry.qa_groups) == {question}
        if entry.level in levels and score >= least and not own:
            hits.append((-score, entry.exp_id, entry.description))
    first = {}
    for hit in sorted(hits):
        first.setdefault(hit[2], hit[:2])
    return list(first.values())[:top_k]


entry_lists = st.lists(
    st.builds(
        Experience,
        level=st.sampled_from(LEVELS),
        title=st.sampled_from(TITLES),
        description=st.sampled_from(["a", "b", "c", "d"]),
        qa_groups=st.lists(st.sampled_from(["q1", "q2", "q3"]), max_size=2, unique=True).map(tuple),
    ),
    max_size=25,
)


@given(
    entries=entry_lists,
    texts=st.lists(st.sampled_from([*TITLES, "who wrote blue lake"]), min_size=1, max_size=3),
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=3, unique=True),
    top_k=st.integers(1, 6),
    threshold=st.sampled_from([None, -1.0, 0.0, 0.5]),
    question=st.sampled_from([None, "q1", "q2"]),
    coded=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(entries, texts, levels, top_k, threshold, question, coded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "CODED_ROWS", 1 if coded else 10**9)
        snapshot = make_snapshot(entries)
        found = snapshot.retrieve_many(
            texts, level=levels, top_k=top_k, threshold=threshold, exclude_questions=[question] * len(texts)
        )
    for text, hits in zip(texts, found, strict=True):
        expected = brute_force(snapshot, text, levels, top_k, threshold, question)
        assert [(-hit.score, hit.experience.exp_id) for hit in hits] == expected


@pytest.mark.parametrize("coded", [False, True])
def test_a_large_store_ranks_as_brute_force(coded, monkeypatch):
    monkeypatch.setattr(index_module, "CODED_ROWS", 1 if coded else 10**9)
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(60)]
    entries = [Experience("E1", " ".join(rng.choice(words, 4)), "d", qa_groups=(f"q{i % 50}",)) for i in range(3000)]
    snapshot = make_snapshot(entries)
    for i in range(20):
        text = " ".join(rng.choice(words, 4))
        hits = snapshot.retrieve(text, top_k=7, threshold=-1.0, exclude_question=f"q{i}")
        expected = brute_force(snapshot, text, LEVELS, 7, -1.0, f"q{i}")
        assert [(-hit.score, hit.experience.exp_id) for hit in hits] == expected


def test_results_do_not_depend_on_the_batch_or_the_thread():
    snapshot = make_snapshot([Experience("E1", f"{a} {b}", "d") for a in TITLES for b in TITLES])
    texts = [f"{a} and {b}" for a in TITLES for b in TITLES]
    alone = [snapshot.retrieve(text, threshold=0.0) for text in texts]
    assert snapshot.retrieve_many(texts, threshold=0.0) == alone
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: snapshot.retrieve(text, threshold=0.0), texts)) == alone


def test_ties_go_to_the_lower_id():
    entries = [Experience("E1", "blue lake", str(i), exp_id=name) for i, name in enumerate(["a", "b", "c"])]
    assert [hit.experience.exp_id for hit in make_snapshot(entries).retrieve("blue lake", top_k=2)] == ["a", "b"]


def test_a_lesson_is_read_once():
    entries = [Experience("E2", "blue lake", "same", exp_id=f"e{i:02d}") for i in range(30)]
    entries += [Experience("E2", "red hill", "other", exp_id="f"), Experience("E3", "blue hill", "same", exp_id="g")]
    found = make_snapshot(entries).retrieve("blue lake", top_k=3)
    assert [(hit.experience.exp_id, hit.experience.description) for hit in found] == [("e00", "same"), ("f", "other")]


def test_the_calibrated_threshold_holds_for_e1_alone():
    snapshot = make_snapshot(
        [Experience("E1", "blue lake", "d"), Experience("E2", "blue lake", "d")], thresholds={"E1": 0.9}
    )
    assert {hit.experience.level for hit in snapshot.retrieve("blue lake")} == {"E1", "E2"}
    assert {hit.experience.level for hit in snapshot.retrieve("lake of something else")} == {"E2"}
    assert len(snapshot.retrieve("lake of something else", threshold=-1.0)) == 2


def test_an_entry_is_not_served_to_its_own_question_or_its_duplicates():
    own = Experience("E1", "When did Blue Lake open?", "d", qa_groups=("q1",))
    snapshot = make_snapshot(
        [own, Experience("E1", "renamed", "d", qa_groups=("q1",))], aliases={"q1": text_key("When did Blue Lake open?")}
    )

    def served(question):
        return len(snapshot.retrieve("when did blue lake open", threshold=-1.0, exclude_question=question))

    assert served(None) == 2
    assert served("q1") == 0
    assert served("q2") == 2
    # The same question under another id, with other spelling.
    assert served(Question("other-id", "when did the BLUE lake open", ("1998",))) == 0
    assert served("When did Blue Lake open") == 0
    assert served(Question("other-id", "when did the red lake open", ("1998",))) == 2


def test_a_duplicate_nobody_registered_is_known_by_its_title():
    snapshot = make_snapshot([Experience("E1", "When did Blue Lake open?", "d", qa_groups=("q1",))])
    twin = Question("q7", "when did blue lake open", ("1998",))
    assert snapshot.retrieve("blue lake", threshold=-1.0, exclude_question=twin) == []


def test_a_pattern_over_several_questions_is_served_to_each_of_them():
    shared = Experience("E2", "blue lake", "d", qa_groups=("q1", "q2"))
    single = Experience("E2", "blue lake", "d", qa_groups=("q1",))
    twins = Experience("E3", "blue lake", "d", qa_groups=("q1", "q1-again"))
    snapshot = make_snapshot([shared, single, twins], aliases={"q1": "text:a", "q1-again": "text:a"})
    assert [h.experience for h in snapshot.retrieve("blue", exclude_question="q1")] == [snapshot.entries[0]]
    assert len(snapshot.retrieve("blue", exclude_question="q2")) == 3


def test_every_field_is_frozen():
    snapshot = make_snapshot([Experience("E1", "blue lake", "d")])
    with pytest.raises(FrozenInstanceError):
        snapshot.id = "other"
    with pytest.raises(ValueError, match="read-only"):
        snapshot.embeddings[0, 0] = 1.0
    with pytest.raises(TypeError):
        snapshot.thresholds["E1"] = 0.0
    with pytest.raises(TypeError):
        snapshot.entries[0] = None


def test_the_vectors_are_a_copy():
    vectors = ENCODER.encode(["blue lake"])
    snapshot = make_snapshot([Experience("E1", "blue lake", "d")], embeddings=vectors)
    before = snapshot.retrieve("blue lake")
    vectors[:] = 0.0
    assert snapshot.retrieve("blue lake") == before


def test_the_id_follows_the_content():
    entries = [Experience("E1", title, "d") for title in TITLES]
    base = make_snapshot(entries)
    assert make_snapshot(entries) == base
    others = [
        make_snapshot(entries[1:]),
        make_snapshot([*entries[:-1], replace(entries[-1], description="e")]),
        make_snapshot([*entries[:-1], replace(entries[-1], qa_groups=("q1",))]),
        make_snapshot(entries, thresholds={"E1": 0.31, "E2": 1.2, "E3": 1.3}),
        make_snapshot(entries, encoder=HashingEncoder(64)),
        make_snapshot(entries, template="2"),
        make_snapshot(entries, aliases={"q1": "text:a"}),
    ]
    assert len({base.id, *(other.id for other in others)}) == len(others) + 1


def test_files_and_pickles_carry_the_whole_snapshot(tmp_path):
    snapshot = make_snapshot([Experience("E1", title, "d", tags=("ü",), meta={"a": [1]}) for title in TITLES])
    snapshot.write(tmp_path / "s.npz")
    for copy in (Snapshot.read(tmp_path / "s.npz"), pickle.loads(pickle.dumps(snapshot))):
        assert copy == snapshot
        assert copy.entries == snapshot.entries
        assert copy.retrieve("blue lake", top_k=4) == snapshot.retrieve("blue lake", top_k=4)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "other", "changed"])
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "s.npz"
    make_snapshot([Experience("E1", title, "d") for title in TITLES]).write(path)
    content = path.read_bytes()
    if damage == "changed":
        with np.load(path) as archive:
            header = archive["header"].tobytes().replace(b"blue lake", b"blue pond", 1)
            np.savez(path, header=np.frombuffer(header, np.uint8), embeddings=archive["embeddings"])
    else:
        path.unlink()
        parts = {"empty": b"", "truncated": content[: len(content) // 2], "other": b"no archive at all"}
        if damage in parts:
            path.write_bytes(parts[damage])
    with pytest.raises(DataError, match=r"s\.npz: "):
        Snapshot.read(path)


def test_an_empty_snapshot_serves_nothing():
    empty = make_snapshot([], embeddings=np.empty((0, 32), np.float32))
    assert empty.retrieve("anything") == []
    assert empty.retrieve_many([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "E4"}, "level: expected one or several of E1, E2, E3, got 'E4'"),
        ({"level": []}, "level: expected"),
        ({"top_k": 0}, "top_k: expected a positive integer, got 0"),
        ({"top_k": 2.0}, "top_k: expected a positive integer"),
        ({"threshold": float("nan")}, "threshold: expected a similarity in -1..2"),
        ({"threshold": 5.0}, "threshold: expected a similarity in -1..2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_snapshot([Experience("E1", "blue lake", "d")]).retrieve("x", **options)


def test_bad_batch():
    snapshot = make_snapshot([Experience("E1", "blue lake", "d")])
    with pytest.raises(ValueError, match="exclude_questions: expected 2 items, one a text, got 1"):
        snapshot.retrieve_many(["a", "b"], exclude_questions=["q"])
    with pytest.raises(TypeError, match="text: expected a string, got list"):
        snapshot.retrieve(["a"])


def test_another_encoder_is_refused():
    snapshot = make_snapshot([Experience("E1", "blue lake", "d")])
    with pytest.raises(ValueError, match=r"encoder: expected 'hashing-v1-d32'.*got 'hashing-v1-d64'"):
        snapshot.with_encoder(HashingEncoder(64))


def test_rows_must_fit_the_entries():
    with pytest.raises(ValueError, match=r"embeddings: expected \(1, d\)"):
        make_snapshot([Experience("E1", "blue lake", "d")], embeddings=ENCODER.encode(["a", "b"]))
    with pytest.raises(ValueError, match="ascending order"):
        make_snapshot([Experience("E1", "a", "d", exp_id="b"), Experience("E1", "a", "e", exp_id="a")])


def test_public_function():
    snapshot = make_snapshot([Experience("E1", "blue lake", "d")])
    assert hiexp.retrieve(snapshot, "blue lake", level="E1") == snapshot.retrieve("blue lake", level="E1")
