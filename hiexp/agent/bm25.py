"""BM25 search in process (package ``bm25s``): exact, deterministic, the index memory-mapped from a disk cache."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.agent.bm25_build import count_words, remove_temporaries, score_matrix
from hiexp.agent.corpus import DocumentStore, store_documents
from hiexp.agent.index_folder import cached_index, check_plan, identity_of, index_at, read_manifest
from hiexp.agent.tools import Document
from hiexp.io import DataError
from hiexp.progress import track

# Values of Anserini and Pyserini for passages, which the usual Wikipedia baselines were made with.
_K1, _B = 0.9, 0.4
_TOKENIZER_VERSION = 1
_WORD = re.compile(r"\w+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def tokenize(text: str) -> list[str]:
    """Lower-case words without accents; no stop words and no stemming: IDF and passages' own wording do that work."""
    text = text.lower()
    if not text.isascii():
        text = _NOT_ASCII.sub(_without_marks, unicodedata.normalize("NFKD", text))
    return _WORD.findall(text)


def _without_marks(run: re.Match[str]) -> str:
    return "".join(char for char in run[0] if not unicodedata.combining(char))


class Bm25Tool:
    """A search tool over one corpus. Build it with :meth:`from_corpus`, or open what ``hiexp index`` made.

    Raises:
        DataError: no whole index there. ValueError: it was made with other settings.
    """

    name = "bm25"

    def __init__(self, folder: Path) -> None:
        bm25s = require("bm25s", "train", "BM25 search")
        # The version of bm25s may differ: its files have kept their form.
        wanted = {key: value for key, value in _settings("").items() if key != "bm25s"}
        check_plan(folder, read_manifest(folder), {"settings": wanted})
        self.identity = f"bm25:{identity_of(folder)}"
        self.documents = DocumentStore(folder)
        self._index = bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)
        self._vocabulary: dict[str, int] = self._index.vocab_dict

    @classmethod
    def from_corpus(cls, path: str | Path, cache_dir: str | Path | None = None) -> Bm25Tool:
        """The tool over a JSONL(.gz) corpus (see :func:`hiexp.agent.corpus.read_corpus`).

        Raises:
            DataError: unusable corpus; the message names file and line.
        """
        settings = _settings(require("bm25s", "train", "BM25 search").__version__)
        return cls(cached_index(path, cache_dir, settings, lambda folder: _build(path, folder)))

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The ``top_k`` best passages of each query that share a word with it; ties go to the earlier passage."""
        return [[document for document, _ in found] for found in self.search_scored(queries, top_k)]

    def search_scored(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Document, float]]]:
        """:meth:`search` with the BM25 score of each passage."""
        return [[(self.documents[row], score) for row, score in self._rows(query, top_k)] for query in queries]

    def _rows(self, query: str, top_k: int) -> list[tuple[int, float]]:
        ids = [self._vocabulary[word] for word in tokenize(query) if word in self._vocabulary]
        if not ids:
            return []
        scores = np.asarray(self._index.get_scores_from_ids(ids))
        return [(row, float(scores[row])) for row in best_rows(scores, top_k)]


def build_bm25_index(corpus: str | Path, out: str | Path) -> Path:
    """Build the index of ``corpus`` in ``out``, in a stream; a killed build begins again.

    Raises:
        ValueError: ``out`` holds the index of another corpus; DataError: unusable corpus or directory.
    """
    settings = _settings(require("bm25s", "train", "BM25 search").__version__)
    return index_at(out, corpus, settings, lambda folder: _build(corpus, folder))


def _settings(version: str) -> dict[str, Any]:
    return {"kind": "bm25", "bm25s": version, "tokenizer": _TOKENIZER_VERSION, "k1": _K1, "b": _B}


def best_rows(scores: NDArray[Any], top_k: int) -> list[int]:
    """Rows of the ``top_k`` largest positive ``scores`` (n,), sorted by (-score, row)."""
    k = min(top_k, len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    rows = np.flatnonzero((scores >= least) & (scores > 0))
    order = np.argsort(-scores[rows], kind="stable")[:k]
    found: list[int] = rows[order].tolist()
    return found


def _build(corpus: str | Path, folder: Path) -> None:
    bm25s = require("bm25s", "train", "BM25 search")
    postings = count_words(track(store_documents(corpus, folder), "counting words"), folder, tokenize)
    if not postings.vocabulary:
        n = len(postings.lengths)
        raise DataError(f"{corpus}: expected passages with words, got none in the {n} titles and texts")
    index = bm25s.BM25(k1=_K1, b=_B)
    index.scores = score_matrix(postings, folder, _K1, _B)
    index.vocab_dict = postings.vocabulary
    index.nonoccurrence_array = None
    index.save(folder, show_progress=False)
    remove_temporaries(folder)
