"""Corpora and cached indexes: every row shape, every fault with file and line, a kill at any moment."""

from __future__ import annotations

import gzip
import json

import pytest

from hiexp.agent.corpus import DocumentStore, read_corpus, store_documents
from hiexp.agent.index_folder import cached_index
from hiexp.agent.tools import Document
from hiexp.io import DataError

SETTINGS = {"kind": "test", "version": 1}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_shapes_of_rows(tmp_path):
    corpus = write(
        tmp_path / "c.jsonl",
        {"id": 7, "title": "T", "text": "é text"},
        {"text": "no title"},
        {"id": "w", "contents": '"Quoted Title"\nbody\nmore'},
        {"contents": "one line"},
    )
    assert list(read_corpus(corpus)) == [
        Document("7", "T", "é text"),
        Document("2", "", "no title"),
        Document("w", "Quoted Title", "body\nmore"),
        Document("4", "", "one line"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b'{"text": "a"}\n{"title": "b"}\n', "c.jsonl:2: expected the key 'text' or 'contents', got ..title"),
        (b'{"text": "a"}\n{"text": 3}\n', "c.jsonl:2: expected strings as title and text"),
        (b'{"text": "a"}\n{"text": ', "c.jsonl:2: not valid JSON"),
        (
            b'{"id": "d", "text": "a"}\n{"text": "b"}\n{"id": "d", "text": "c"}\n',
            r"c.jsonl:3: id 'd' was used before, at .*c.jsonl:1",
        ),
        (b'{"id": 2, "text": "a"}\n{"text": "b"}\n', r"c.jsonl:2: id '2' was used before, at .*c.jsonl:1"),
        (b'{"text": "\xff"}\n', "c.jsonl:1: not valid UTF-8"),
    ],
)
def test_faults_name_file_and_line_and_leave_no_index(tmp_path, content, message):
    corpus, cache = tmp_path / "c.jsonl", tmp_path / "cache"
    corpus.write_bytes(content)
    with pytest.raises(DataError, match=message):
        cached_index(corpus, cache, SETTINGS, lambda folder: list(store_documents(corpus, folder)))
    assert list(cache.iterdir()) == []


def test_truncated_gzip_and_missing_file(tmp_path):
    corpus = tmp_path / "c.jsonl.gz"
    corpus.write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:\d+: truncated"):
        list(read_corpus(corpus))
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        cached_index(tmp_path / "absent.jsonl", tmp_path, SETTINGS, lambda folder: None)


def test_documents_come_back_from_disk(tmp_path):
    corpus = write(tmp_path / "c.jsonl", *({"id": str(i), "title": f"T{i}", "text": "ü\n" * i} for i in range(20)))
    stored = list(store_documents(corpus, tmp_path))
    store = DocumentStore(tmp_path)
    assert len(store) == 20
    assert [store[i] for i in (19, 0, 7)] == [stored[i] for i in (19, 0, 7)]


def test_an_index_is_built_once_per_content_and_settings(tmp_path):
    corpus, cache, built = write(tmp_path / "c.jsonl", {"text": "a"}), tmp_path / "cache", []

    def index(settings=SETTINGS):
        def build(folder):
            built.append(folder)
            (folder / "data").write_text("x" * 10)

        return cached_index(corpus, cache, settings, build)

    first = index()
    assert index() == first
    assert len(built) == 1
    assert index({**SETTINGS, "version": 2}) != first
    write(corpus, {"text": "b"})
    assert index() != first
    assert len(built) == 3


def test_a_build_that_dies_leaves_nothing_and_a_damaged_index_is_built_again(tmp_path):
    corpus, cache = write(tmp_path / "c.jsonl", {"text": "a"}), tmp_path / "cache"

    def dies(folder):
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_index(corpus, cache, SETTINGS, dies)
    assert list(cache.iterdir()) == []

    def build(folder):
        (folder / "data").write_text("whole")

    folder = cached_index(corpus, cache, SETTINGS, build)
    (folder / "data").write_text("who")
    assert (cached_index(corpus, cache, SETTINGS, build) / "data").read_text() == "whole"


def test_two_builders_at_once_agree(tmp_path):
    """The slower one finds the index of the faster one in place and uses it."""
    corpus, cache = write(tmp_path / "c.jsonl", {"text": "a"}), tmp_path / "cache"

    def fast(folder):
        (folder / "data").write_text("fast")

    def slow(folder):
        cached_index(corpus, cache, SETTINGS, fast)
        (folder / "data").write_text("slow")

    folder = cached_index(corpus, cache, SETTINGS, slow)
    assert (folder / "data").read_text() == "fast"
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_default_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HIEXP_CACHE", str(tmp_path / "home"))
    corpus = write(tmp_path / "c.jsonl", {"text": "a"})
    folder = cached_index(corpus, None, SETTINGS, lambda folder: (folder / "data").touch())
    assert folder.parent == tmp_path / "home" / "indexes"
