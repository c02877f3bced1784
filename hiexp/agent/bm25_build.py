"""BM25 indexes built in a stream: bm25s's own files, without its need to hold all postings in memory.

First the passages are counted in blocks and their postings (word, count) appended to a file in the order of passages;
then, with document frequencies and the mean length known, scores are put in their places by word, a counting sort over
memory-mapped files. Held in memory: the vocabulary, 16 bytes a word, 8 bytes a passage, and one block.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.tools import Document

_BLOCK = 8192  # passages counted at a time: about 4 million words
_WORDS, _COUNTS = ".words", ".counts"


class Postings(NamedTuple):
    """What the first pass leaves: two files in order of passages, and what fits into memory."""

    words: Path  # int32 numbers of words
    counts: Path  # int32 occurrences of that word in that passage
    vocabulary: dict[str, int]
    frequencies: NDArray[np.int64]  # (V,) passages that hold each word
    lengths: NDArray[np.int32]  # (n,) words of each passage
    distinct: NDArray[np.int32]  # (n,) postings of each passage


def count_words(documents: Iterable[Document], folder: Path, tokenize: Callable[[str], list[str]]) -> Postings:
    """The postings of ``documents``, written into ``folder``."""
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # a new word gets the next number
    lengths, distinct = array("i"), array("i")
    frequencies = np.zeros(0, np.int64)
    with open(folder / _WORDS, "wb") as words_file, open(folder / _COUNTS, "wb") as counts_file:
        for block in _blocks(documents):
            flat, sizes = array("i"), array("i")
            for document in block:
                tokens = tokenize(f"{document.title} {document.text}")
                flat.extend(map(vocabulary.__getitem__, tokens))
                sizes.append(len(tokens))
            owners = np.repeat(np.arange(len(sizes)), np.frombuffer(sizes, np.int32))
            ids = np.frombuffer(flat, np.int32) if flat else np.empty(0, np.int32)
            # One number per (passage, word): sorting it groups them in the order of passages.
            keys, counts = np.unique(owners * np.int64(1 << 32) + ids, return_counts=True)
            words = (keys & 0xFFFFFFFF).astype(np.int32)
            words.tofile(words_file)
            counts.astype(np.int32).tofile(counts_file)
            lengths.extend(sizes)
            distinct.extend(np.bincount(keys >> 32, minlength=len(sizes)).tolist())
            frequencies = np.pad(frequencies, (0, len(vocabulary) - len(frequencies)))
            frequencies += np.bincount(words, minlength=len(vocabulary))
    sizes_of = (np.frombuffer(lengths, np.int32), np.frombuffer(distinct, np.int32))
    return Postings(folder / _WORDS, folder / _COUNTS, dict(vocabulary), frequencies, *sizes_of)


def score_matrix(postings: Postings, folder: Path, k1: float, b: float) -> dict[str, Any]:
    """Scores by word in bm25s's form (Lucene's formula): ``data``, ``indices``, ``indptr``, ``num_docs``.

    ``data`` and ``indices`` are memory-mapped files in ``folder`` whose names begin with a dot.
    """
    n, total = len(postings.lengths), int(postings.frequencies.sum())
    df = postings.frequencies.astype(np.float64)
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5)).astype(np.float32)  # (V,)
    mean_length = postings.lengths.mean(dtype=np.float64)
    indptr = np.concatenate([[0], np.cumsum(postings.frequencies)])
    heads = indptr[:-1].copy()  # where the next posting of each word goes
    data = np.memmap(folder / ".data", np.float32, "w+", shape=(total,))
    indices = np.memmap(folder / ".indices", np.int32, "w+", shape=(total,))
    all_words = np.memmap(postings.words, np.int32, "r", shape=(total,))
    all_counts = np.memmap(postings.counts, np.int32, "r", shape=(total,))
    starts = np.concatenate([[0], np.cumsum(postings.distinct, dtype=np.int64)])
    for first in range(0, n, _BLOCK):
        last = min(n, first + _BLOCK)
        part = slice(int(starts[first]), int(starts[last]))
        order = np.argsort(all_words[part], kind="stable")  # passages stay in order within a word
        words, counts = all_words[part][order], all_counts[part][order].astype(np.float64)
        rows = np.repeat(np.arange(first, last), postings.distinct[first:last])[order]
        norm = k1 * (1 - b + b * postings.lengths[rows] / mean_length)
        seen, begins, sizes = np.unique(words, return_index=True, return_counts=True)
        places = np.repeat(heads[seen] - begins, sizes) + np.arange(len(words))
        data[places] = idf[words] * (counts / (counts + norm))
        indices[places] = rows
        heads[seen] += sizes
    return {"data": data, "indices": indices, "indptr": indptr, "num_docs": n}


def remove_temporaries(folder: Path) -> None:
    """Delete the files of both passes."""
    for name in (_WORDS, _COUNTS, ".data", ".indices"):
        (folder / name).unlink(missing_ok=True)


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while block := list(itertools.islice(iterator, _BLOCK)):
        yield block
