"""The HEK as a file: one writer, threads, crashes, damaged and foreign files."""

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hiexp.experience import schema
from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.store import HEK
from hiexp.io import DataError

from .conftest import lesson

# ------------------------------------------------------------------ one writer, threads, crashes

OPEN_FOR_WRITING = "import sys; from hiexp.experience.store import HEK; HEK.open(sys.argv[1], 'w')"


def test_a_second_writer_is_refused_at_once(path, hek):
    with pytest.raises(ValueError, match=rf"hek\.sqlite: already open for writing \(process {os.getpid()}\)"):
        HEK.open(path, "w")
    other = subprocess.run([sys.executable, "-c", OPEN_FOR_WRITING, path], capture_output=True, text=True, check=False)
    assert "already open for writing" in other.stderr
    HEK.open(path).close()
    hek.close()
    hek.close()
    HEK.open(path, "w").close()


def test_a_reader_cannot_write(path, hek):
    with HEK.open(path) as reader, pytest.raises(ValueError, match="open for reading; open it with mode='w'"):
        reader.add([lesson(1)])


WRITE_UNTIL_KILLED = """
import sys
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
hek = HEK.open(sys.argv[1], "w")
for batch in range(10**6):
    hek.add([Experience("E1", f"title {batch} {i}", f"lesson {batch} {i}", sources=(f"r{i}",)) for i in range(10)])
    print(batch, flush=True)
"""


@pytest.mark.parametrize("batches", [1, 9])
def test_a_killed_writer_leaves_whole_batches_and_a_free_lock(path, hek, batches):
    hek.close()
    writer = subprocess.Popen([sys.executable, "-c", WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE, text=True)
    for _ in range(batches):
        assert writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with HEK.open(path, "w") as again:
        assert len(again) >= 10 * batches
        assert len(again) % 10 == 0
        assert len(again.snapshot()) == len(again)
        assert len(again.entries_from("r3")) == len(again) // 10
        again.add([lesson(1)])
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_full_disk_loses_nothing_that_was_stored(path, hek):
    kept = hek.add([lesson(1)])
    before = hek.snapshot()
    # SQLite answers a file at its page limit as it answers a full disk.
    (pages,) = hek.database.rows("PRAGMA page_count")[0]
    hek.database.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(DataError, match=r"hek\.sqlite: database or disk is full"):
        hek.add([lesson(i) for i in range(2, 500)])
    assert hek.snapshot() == before
    hek.database.execute("PRAGMA max_page_count = 1000000")
    hek.add([lesson(2)])
    hek.close()
    with HEK.open(path) as again:
        assert len(again) == 2
        assert again.get(kept[0].exp_id) == kept[0]


def test_threads_share_one_hek(hek):
    def work(number):
        hek.add([lesson(number), lesson(number % 4)])
        return hek.retrieve(lesson(number).title, level="E1", top_k=1)[0].experience.title

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(40)))
    assert found == [lesson(number).title for number in range(40)]
    assert len(hek) == 40


# ------------------------------------------------------------------ bad files


def test_missing_file(path):
    for mode in ("r", "w"):
        with pytest.raises(DataError, match=r"hek\.sqlite: no such HEK file"):
            HEK.open(path, mode)
    assert list(path.parent.iterdir()) == []


def test_create_refuses_an_existing_file(path, hek):
    hek.add([lesson(1)])
    with pytest.raises(ValueError, match="exists already"):
        HEK.create(path)
    assert len(hek) == 1


def test_create_opens_what_is_there_where_that_is_asked_for(path):
    for _ in range(2):
        with HEK.create(path, encoder="hashing:64", exist_ok=True) as hek:
            hek.add([lesson(1)])
            assert len(hek) == 1
    with pytest.raises(ValueError, match="got 'hashing-v1-d32'"):
        HEK.create(path, encoder="hashing:32", exist_ok=True)
    path.write_bytes(b"no HEK")
    with pytest.raises(DataError):
        HEK.create(path, encoder="hashing:64", exist_ok=True)
    assert path.read_bytes() == b"no HEK"


@pytest.mark.parametrize(
    "content", [b"", b"no database", b"SQLite format 3\x00" + bytes(10), b"SQLite format 3\x00" + bytes(2000)]
)
def test_no_sqlite_file(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"hek\.sqlite: "):
        HEK.open(path, "w")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_file(path, hek, share):
    hek.add([lesson(i) for i in range(300)])
    hek.close()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"truncated: expected {len(content)} bytes, got {int(len(content) * share)}"):
        HEK.open(path)


def test_damaged_pages(path, hek):
    hek.add([lesson(i) for i in range(300)])
    hek.close()
    content = bytearray(path.read_bytes())
    content[8192:-4096] = os.urandom(len(content) - 8192 - 4096)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"hek\.sqlite: "), HEK.open(path) as damaged:
        damaged.snapshot()


def test_another_schema_version(path, hek):
    hek.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match=r"HEK schema version 2, this hiexp reads version 1"):
        HEK.open(path)


def test_another_database(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE revisions (x)")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match="a SQLite file, but not a HEK"):
        HEK.open(path, "w")


def test_another_encoder(path, hek):
    hek.close()
    for encoder in ("hashing:128", HashingEncoder(128)):
        with pytest.raises(ValueError, match=r"holds vectors of encoder 'hashing-v1-d64', got 'hashing-v1-d128'"):
            HEK.open(path, "w", encoder=encoder)
    HEK.open(path, "w", encoder="hashing:64").close()  # the refused opener gave the lock back


class NamelessEncoder(HashingEncoder):
    """An encoder that only the caller can build."""

    def __init__(self):
        super().__init__(64)
        self.id, self.spec = "mine-v1", ""


def test_an_encoder_without_a_spec_must_be_passed(path):
    with HEK.create(path, encoder=NamelessEncoder()) as hek:
        hek.add([lesson(1)])
    with HEK.open(path) as hek:
        assert len(hek.snapshot()) == 1
        with pytest.raises(ValueError, match="'mine-v1' cannot be loaded by name"):
            hek.retrieve("anything")
    with HEK.open(path, encoder=NamelessEncoder()) as hek:
        assert hek.retrieve(lesson(1).title, level="E1")


def test_bad_mode(path, hek):
    with pytest.raises(ValueError, match="mode: expected 'r' or 'w', got 'a'"):
        HEK.open(path, "a")


def test_unwritable_places(tmp_path):
    for place in (tmp_path / "no" / "such" / "folder" / "hek.sqlite", "/proc/hek.sqlite"):
        with pytest.raises(DataError, match=r"hek\.sqlite: cannot be created"):
            HEK.create(place)


def test_reading_from_a_folder_that_cannot_be_written(path, hek, monkeypatch):
    hek.add([lesson(1)])
    hek.close()
    # Tests may run as root, whom permissions do not stop: say so on the folder's behalf.
    monkeypatch.setattr(schema.os, "access", lambda *_: False)
    with HEK.open(path) as reader:
        assert len(reader) == 1
        assert sorted(p.name for p in path.parent.iterdir()) == ["hek.sqlite", "hek.sqlite.lock"]
