"""Export and import: a round trip gives the same snapshot; a damaged export leaves nothing behind."""

import json

import pytest

from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.record import STATUSES
from hiexp.experience.store import HEK
from hiexp.io import DataError
from hiexp.tasks.question import Question

from .conftest import lesson


@pytest.mark.parametrize("name", ["hek.jsonl", "hek.jsonl.gz"])
def test_a_round_trip_gives_the_same_snapshot(tmp_path, hek, name):
    hek.register_questions([Question(f"q{i}", f"When did play {i} open?", (f"answer{i}",)) for i in range(4)])
    entries = hek.add([lesson(i) for i in range(5)] + [lesson(6, description="answer3")])
    hek.revise(entries[0].exp_id, description="changed")
    hek.revise(entries[1].exp_id, status="retired")
    hek.quarantine_reply("raw", "reason")
    hek.calibrate()
    assert hek.export(tmp_path / name) == 8
    with HEK.import_(tmp_path / name, tmp_path / "copy.sqlite") as copy:
        assert copy.snapshot() == hek.snapshot()
        assert copy.entries(status=STATUSES) == hek.entries(status=STATUSES)
        assert copy.revisions(entries[0].exp_id) == hek.revisions(entries[0].exp_id)
        assert copy.quarantined() == hek.quarantined()
        assert copy.calibration == hek.calibration
        assert copy.entries_from("q2/0/1") == hek.entries_from("q2/0/1")
        # The guard moved along.
        assert copy.add([lesson(9, description="answer2")])[0].status == "quarantine"


def test_current_revisions_alone_give_the_same_snapshot_too(tmp_path, hek):
    entry = hek.add([lesson(1)])[0]
    hek.revise(entry.exp_id, description="changed")
    assert hek.export(tmp_path / "hek.jsonl", current_only=True) == 1
    with HEK.import_(tmp_path / "hek.jsonl", tmp_path / "copy.sqlite") as copy:
        assert copy.snapshot() == hek.snapshot()
        assert [revision.rev for revision in copy.revisions(entry.exp_id)] == [2]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, '{"kind": "revision"}', r":1: expected a HEK export of schema 1, got kind 'revision'"),
        (2, "{broken", r":2: not valid JSON"),
        (2, '{"kind": "revision", "experience": {"level": "E1"}}', r":2: not a line of a HEK export"),
        (2, '{"kind": "poem"}', r":2: not a line of a HEK export: unknown kind 'poem'"),
        (3, '{"kind": "question", "question_id": "q"}', r":3: not a line of a HEK export: 'text_key'"),
    ],
)
def test_damaged_exports_leave_nothing_behind(tmp_path, hek, line, text, message):
    hek.add([lesson(i) for i in range(3)])
    source, target = tmp_path / "hek.jsonl", tmp_path / "copy.sqlite"
    hek.export(source)
    lines = source.read_text().splitlines()
    lines[line - 1] = text
    source.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        HEK.import_(source, target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", r":1: not the header of a HEK export: Expecting property name"),
        (7, r":1: calibration: expected text, got int"),
        ("{}", r":1: not the header of a HEK export: calibration: expected an object with the keys encoder_id"),
        ({"thresholds": {"E1": 0.5, "E2": 1.0}}, r":1: .* thresholds\['E3'\]: expected a finite number, got None"),
        ({"thresholds": {"E1": float("nan")}}, r":1: .* thresholds\['E1'\]: expected a finite number, got nan"),
        ({"thresholds": None}, r":1: .* thresholds\['E1'\]: expected a finite number"),
        ({"dim": 32}, r":1: calibration: expected one of .* with 64 dimensions, got .* with 32"),
        ({"encoder_id": "other"}, r":1: calibration: expected one of .*, got 'other'"),
    ],
)
def test_import_checks_the_calibration(tmp_path, hek, changes, message):
    source, target = tmp_path / "hek.jsonl", tmp_path / "copy.sqlite"
    hek.export(source)
    first, *rest = source.read_text().splitlines()
    header = json.loads(first)
    if isinstance(changes, dict):
        header["calibration"] = json.dumps(json.loads(header["calibration"]) | changes)
    else:
        header["calibration"] = changes
    source.write_text("\n".join([json.dumps(header), *rest]))
    with pytest.raises(DataError, match=message):
        HEK.import_(source, target)
    assert not target.exists()


def test_an_encoder_without_a_spec_is_passed_to_the_import(tmp_path):
    class Own(HashingEncoder):
        def __init__(self, dim):
            super().__init__(dim)
            self.id, self.spec = f"own-{dim}", ""

    with HEK.create(tmp_path / "own.sqlite", encoder=Own(64)) as store:
        store.add([lesson(1)])
        store.export(tmp_path / "hek.jsonl")
        with pytest.raises(ValueError, match=r":1: its encoder 'own-64' has no spec to load it by; pass it"):
            HEK.import_(tmp_path / "hek.jsonl", tmp_path / "copy.sqlite")
        assert not (tmp_path / "copy.sqlite").exists()
        with HEK.import_(tmp_path / "hek.jsonl", tmp_path / "copy.sqlite", encoder=Own(64)) as copy:
            assert copy.snapshot() == store.snapshot()


def test_import_checks_the_encoder(tmp_path, hek):
    hek.add([lesson(1)])
    hek.export(tmp_path / "hek.jsonl")
    with pytest.raises(ValueError, match="one HEK cannot mix two encoders"):
        HEK.import_(tmp_path / "hek.jsonl", tmp_path / "copy.sqlite", encoder="hashing:128")
    assert not (tmp_path / "copy.sqlite").exists()
