"""Crash-safe writing and JSON-lines reading: every way a file can be bad names the file and, where known, the line."""

import gzip
import json
import os

import pytest

from hiexp import io
from hiexp.io import DataError, append_jsonl, atomic_write, read_jsonl, write_jsonl


def test_round_trip_plain_and_gzip(tmp_path):
    rows = [{"a": 1, "text": "größe\u2028"}, {"a": 2, "text": ""}]
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert write_jsonl(tmp_path / name, rows) == 2
        assert [row for _, row in read_jsonl(tmp_path / name)] == rows


def test_equal_content_gives_equal_gzip_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", [{"x": 1}])
    write_jsonl(tmp_path / "b.jsonl.gz", [{"x": 1}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_blank_lines_are_skipped_and_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [number for number, _ in read_jsonl(tmp_path / "rows.jsonl")] == [1, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\n\n", "empty file"),
        (b'{"question": "q"}\n{"question": ', r":2: not valid JSON"),
        (b'{"question": "q"}\n{"question": "\xff\xfe"}\n', r":2: not valid UTF-8"),
        (b'{"question": "q"}\n[1, 2]\n', r":2: expected a JSON object, got list"),
        (b'{"question": "q"}\n{"question": ' + b"9" * 5000 + b"}", r":2: not usable JSON: .*digits"),
        (
            b'{"question": "q"}\n{"question": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            r":2: not usable JSON: .*recursion",
        ),
        (b'{"question": "q"}\n{"question": {"text": "a \\ud800"}}\n', r":2: a string with a lone surrogate"),
        (b'{"question": "q"}\n{"\\uDFFF": "a"}\n', r":2: a string with a lone surrogate"),
        (b'{"question": "q"}\n{"text": "q"}\n', r":2: expected the key\(s\) 'question'"),
    ],
)
def test_bad_content_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        list(read_jsonl(path, required=["question"]))


def test_escaped_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, {"a": "\U0001f600"})]


def test_a_log_cut_short_loses_only_its_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert list(read_jsonl(path, torn_tail=True)) == [(1, {"a": 1})]
    path.write_text('{"a"')
    assert list(read_jsonl(path, torn_tail=True)) == []
    path.write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:1: not valid JSON"):
        list(read_jsonl(path, torn_tail=True))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="expected a file, it is a folder"):
        list(read_jsonl(tmp_path))


@pytest.mark.parametrize("damage", ["truncate", "flip", "not gzip"])
def test_damaged_gzip(tmp_path, damage):
    data = bytearray(gzip.compress("".join(json.dumps({"n": n}) + "\n" for n in range(5000)).encode()))
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b'{"n": 1}\n')
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:\d+: "):
        list(read_jsonl(path))


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    atomic_write(path, "old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device; make room .* same command.*state.json'") as found:
        atomic_write(path, "new")
    assert (found.value.errno, found.value.filename) == (28, str(path))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    with pytest.raises(OSError, match=r"make room.*log.jsonl'"):
        append_jsonl(tmp_path / "log.jsonl", [{"n": 1}])


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\] No such file"):
        atomic_write(tmp_path / "none" / "state.json", "new")


def test_a_tree_is_flushed_with_all_its_files_and_folders(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    flushed = []
    monkeypatch.setattr(io.os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    io.fsync_tree(tmp_path / "a")
    assert sorted(flushed) == [str(tmp_path / name) for name in ("a", "a/b", "a/b/file")]


@pytest.mark.parametrize("torn", [b"", b'{"a": 9, "te', b"x" * 200_000])
def test_appending_removes_a_torn_line_and_keeps_whole_ones(tmp_path, torn):
    log = tmp_path / "log.jsonl"
    append_jsonl(log, [{"a": 1}, {"a": 2, "text": "größe\n\u2028"}])
    with open(log, "ab") as stream:
        stream.write(torn)
    append_jsonl(log, [{"a": 3}])
    append_jsonl(log, [])
    assert [row["a"] for _, row in read_jsonl(log)] == [1, 2, 3]


def test_appending_to_a_log_without_a_whole_line_starts_anew(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"{" * 70_000)
    append_jsonl(tmp_path / "log.jsonl", [{"a": 1}])
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"a": 1}\n'
