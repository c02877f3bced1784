"""The vectors of a corpus on disk: shards of unit rows, written one after the other, memory-mapped when read.

A build that is killed goes on behind the last whole shard. Rows are those of the :class:`DocumentStore` beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.corpus import DocumentStore, has_documents, store_documents
from hiexp.agent.index_memory import BLOCK_CELLS, ROW_BYTES
from hiexp.experience.encoder import Encoder
from hiexp.io import DataError, fsync_directory
from hiexp.progress import track

SHARD_ROWS = 100_000  # what a kill can cost, in passages
_ENCODE_ROWS = 1024  # passages encoded at a time
_UNIT_TOLERANCE = 1e-3


class ShardedVectors:
    """The rows of an index directory, over all shards; nothing is loaded before it is asked for.

    Attributes:
        dim: length of a row.

    Raises:
        DataError: shards that do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("vectors_*.npy"))
        self.shards = [np.load(file, mmap_mode="r") for file in files]
        if not files or len({(shard.shape[1:], shard.dtype.str) for shard in self.shards}) != 1:
            shapes = sorted({f"{shard.shape} {shard.dtype}" for shard in self.shards})
            raise DataError(f"{folder}: expected shards of vectors of one length and type, got {shapes}")
        self.dim = int(self.shards[0].shape[1])
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])  # (shards + 1,)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, cells: int = BLOCK_CELLS) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order, as ``(first row, float32 block of at most ``cells`` numbers)``.

        A block of float16 rows is valid until the next one is asked for: a new array each would take twice the time.
        """
        rows = max(1, cells // self.dim)
        single = np.empty((rows if self.shards[0].dtype != np.float32 else 0, self.dim), np.float32)
        for start, shard in zip(self.starts.tolist(), self.shards, strict=False):
            for first in range(0, len(shard), rows):
                block = shard[first : first + rows]
                if block.dtype != np.float32:
                    np.copyto(single[: len(block)], block)
                    block = single[: len(block)]
                yield start + first, block

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows by number, (len(rows), d)."""
        taken = np.empty((len(rows), self.dim))
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            taken[mine] = self.shards[owner][rows[mine] - self.starts[owner]]
        return taken


def build_vectors(
    corpus: str | Path, folder: Path, encoder: Encoder, prefix: str, dtype: str, shard_rows: int = SHARD_ROWS
) -> None:
    """Fill ``folder`` with documents and vectors of ``corpus``, or finish what a killed build left there.

    Raises:
        DataError: unusable corpus. ValueError: the encoder breaks its promise, or an unknown ``dtype``.
    """
    if dtype not in ROW_BYTES:
        raise ValueError(f"dtype: expected float32 or float16, got {dtype!r}")
    encode_texts(encoder, [f"{prefix}hiexp"])  # a wrong encoder is found before gigabytes are copied
    if not has_documents(folder):
        for _ in track(store_documents(corpus, folder), "reading passages"):
            pass
    documents = DocumentStore(folder)
    n = len(documents)
    starts = [start for start in range(0, n, shard_rows) if not _shard_file(folder, start // shard_rows).exists()]
    todo = [(s, r) for s in starts for r in range(s, min(n, s + shard_rows), _ENCODE_ROWS)]
    for start, row in track(todo, "encoding passages", total=len(todo)):
        stop = min(n, start + shard_rows)
        if row == start:
            shard = _open_shard(folder, (stop - start, encoder.dim), dtype)
        block = [documents[i] for i in range(row, min(stop, row + _ENCODE_ROWS))]
        vectors = encode_texts(encoder, [f"{prefix}{doc.title}\n{doc.text}" for doc in block])
        shard[row - start : row - start + len(block)] = vectors
        if row + len(block) == stop:
            _close_shard(folder, start // shard_rows, shard)


def encode_texts(encoder: Encoder, texts: list[str]) -> NDArray[np.float32]:
    """(n, d) float32 unit rows from ``encoder``.

    Raises:
        ValueError: it returns anything else.
    """
    vectors = np.ascontiguousarray(encoder.encode(texts), dtype=np.float32)
    if vectors.shape != (len(texts), encoder.dim) or not np.isfinite(vectors).all():
        raise ValueError(
            f"encoder: expected {len(texts)} finite vectors of length {encoder.dim} from {encoder.id!r}, "
            f"got shape {vectors.shape}"
        )
    norms = np.linalg.norm(vectors, axis=1)
    if not np.allclose(norms, 1.0, atol=_UNIT_TOLERANCE):
        raise ValueError(f"encoder: expected unit vectors from {encoder.id!r}, got one of norm {norms.max():.4g}")
    return vectors


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"vectors_{number:05d}.npy"


def _open_shard(folder: Path, shape: tuple[int, int], dtype: str) -> NDArray[np.float32]:
    # Written through a memory map: a shard need not fit into memory. Half of one has a name that nobody reads.
    array: NDArray[np.float32] = np.lib.format.open_memmap(folder / ".shard", "w+", np.dtype(dtype), shape)
    return array


def _close_shard(folder: Path, number: int, shard: NDArray[np.float32]) -> None:
    assert isinstance(shard, np.memmap)
    shard.flush()
    os.replace(folder / ".shard", _shard_file(folder, number))
    fsync_directory(folder)
