"""How much disk and memory a search index will take, said before it is built."""

from __future__ import annotations

import math
from typing import NamedTuple

DENSE_KINDS = ("exact", "flat", "ivf", "hnsw")
ROW_BYTES = {"float32": 4, "float16": 2}
# Wikipedia 2018 in 100-word passages: 14 GB of JSON lines for 21,015,324 passages.
WIKIPEDIA_TEXT_BYTES = 670
HNSW_NEIGHBOURS = 32  # links of a node per level, twice as many on the lowest one
# Rows of a search are read and multiplied in blocks of at most this many float32 numbers (vectors and scores alike).
BLOCK_CELLS = 1 << 22
_WORD_BYTES = 130  # one entry of a Python dict from word to number


class MemoryEstimate(NamedTuple):
    """Bytes an index takes.

    Attributes:
        disk: everything in the index directory, texts included.
        resident: memory the process cannot give back while it serves. What is memory-mapped is not counted: the kernel
            drops those pages when memory is short, and searches are fast while it does not.
    """

    disk: int
    resident: int


def memory_estimate(
    n_passages: int, dim: int, kind: str, *, dtype: str = "float32", text_bytes: int = WIKIPEDIA_TEXT_BYTES
) -> MemoryEstimate:
    """Bytes that an index of ``n_passages`` takes on disk and in memory.

    Args:
        dim: length of a vector; for ``bm25`` the mean number of distinct words in a passage.
        kind: ``exact`` (memory-mapped shards), ``flat``, ``ivf`` or ``hnsw`` (faiss), or ``bm25``.
        dtype: type of the stored vectors, float32 or float16.
        text_bytes: mean length of a passage in UTF-8.

    Raises:
        ValueError: an unknown kind or dtype, or a size below 1.
    """
    _check(n_passages, dim, kind, dtype)
    texts = n_passages * (text_bytes + 8)  # and the offset of each
    if kind == "bm25":
        # One float32 score and one int32 row per distinct word of a passage; a query needs the scores of all rows.
        vocabulary = round(_heaps_vocabulary(n_passages * dim))
        disk = texts + n_passages * dim * 8 + vocabulary * 24
        return MemoryEstimate(disk, n_passages * 16 + vocabulary * _WORD_BYTES)
    vectors = n_passages * dim * ROW_BYTES[dtype]
    extra, loaded = _faiss_bytes(n_passages, dim, kind, dtype)
    blocks = 2 * BLOCK_CELLS * 4  # vectors, and their scores
    return MemoryEstimate(texts + vectors + extra, loaded + blocks)


def list_count(n_passages: int) -> int:
    """Inverted lists of an IVF index: 4 sqrt(n), rounded to a power of two, with 39 passages a list at least."""
    wanted = 2 ** round(math.log2(max(1.0, 4 * math.sqrt(n_passages))))
    return int(max(1, min(wanted, n_passages // 39)))


def _faiss_bytes(n_passages: int, dim: int, kind: str, dtype: str) -> tuple[int, int]:
    """Bytes of faiss's own file, and what of it must be in memory."""
    row = dim * ROW_BYTES[dtype]
    if kind == "flat":
        return 0, n_passages * dim * 4  # filled from the shards when it is opened
    if kind == "ivf":
        lists = list_count(n_passages)
        centres = lists * dim * 4
        return n_passages * (row + 8) + centres, centres + lists * 64  # the lists are memory-mapped
    if kind == "hnsw":
        # 2 M links on the lowest level and M on each higher one, where 1 node in M is found.
        links = round(4 * (2 * HNSW_NEIGHBOURS + HNSW_NEIGHBOURS / (HNSW_NEIGHBOURS - 1)))
        whole = n_passages * (row + links + 12)
        return whole, whole
    return 0, 0


def _heaps_vocabulary(postings: int) -> float:
    """Distinct words of a text by Heaps's law, fitted to 15,000 passages of Wikipedia: 67,343 words in 733,123."""
    return float(7.7 * postings**0.672)


def _check(n_passages: int, dim: int, kind: str, dtype: str) -> None:
    if kind not in (*DENSE_KINDS, "bm25"):
        raise ValueError(f"kind: expected one of {', '.join(DENSE_KINDS)}, bm25; got {kind!r}")
    if dtype not in ROW_BYTES:
        raise ValueError(f"dtype: expected float32 or float16, got {dtype!r}")
    for name, value in (("n_passages", n_passages), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
