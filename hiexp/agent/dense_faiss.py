"""faiss behind dense search: flat, inverted lists (IVF) or a neighbour graph (HNSW) over the shards of an index.

IVF and HNSW are files beside the shards, made once and replaced as a whole. IVF is built shard by shard and its lists
stay on disk, memory-mapped, so it serves corpora larger than memory; HNSW and flat live in memory
(:func:`hiexp.agent.index_memory.memory_estimate`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.agent.dense_index import ShardedVectors
from hiexp.agent.dense_search import Ranked, rank
from hiexp.agent.index_folder import build_lock
from hiexp.agent.index_memory import HNSW_NEIGHBOURS, list_count
from hiexp.io import fsync_tree
from hiexp.progress import track

# Rows per centre that k-means sees: just above the 39 below which faiss warns.
_TRAINING_ROWS = 40
_SEED = 1234
DEFAULT_EFFORT = {"ivf": 64, "hnsw": 128}


class FaissSearcher:
    """Candidates from faiss, scored exactly from the shards.

    Args:
        kind: ``flat`` (exact, in memory), ``ivf`` or ``hnsw`` (approximate).
        effort: lists searched (ivf) or candidates followed (hnsw) per query; None: 64 and 128.
        device: ``cpu`` or ``cuda`` (faiss-gpu; flat and ivf).

    Raises:
        ImportError: no faiss. ValueError: ``cuda`` where faiss has no GPU, or for hnsw.
    """

    def __init__(
        self, folder: Path, vectors: ShardedVectors, kind: str, effort: int | None = None, device: str = "cpu"
    ) -> None:
        self._faiss = require("faiss", "train", f"dense search with an index of kind {kind!r}")
        self._vectors, self.kind = vectors, kind
        if device != "cpu":
            _check_gpu(self._faiss, kind, device)
        self._index = _flat(self._faiss, vectors) if kind == "flat" else _saved(self._faiss, folder, vectors, kind)
        if kind == "ivf":
            self._index.nprobe = effort or DEFAULT_EFFORT[kind]
        elif kind == "hnsw":
            self._index.hnsw.efSearch = effort or DEFAULT_EFFORT[kind]
        if device != "cpu":
            self._resources = self._faiss.StandardGpuResources()
            self._index = self._faiss.index_cpu_to_gpu(self._resources, 0, self._index)

    def search(self, queries: NDArray[np.float32], top_k: int) -> list[Ranked]:
        """As :class:`hiexp.agent.dense_search.Searcher`; twice ``top_k`` candidates are scored."""
        if len(queries) == 0:
            return []
        wanted = min(2 * top_k + 16, len(self._vectors))
        _, found = self._index.search(np.ascontiguousarray(queries), wanted)
        return [rank(self._vectors, q, rows[rows >= 0], top_k) for q, rows in zip(queries, found, strict=True)]


def faiss_folder(folder: Path, kind: str) -> Path:
    """Where the faiss files of ``kind`` lie in the index ``folder``."""
    return folder / f"faiss_{kind}"


def build_faiss(folder: Path, vectors: ShardedVectors, kind: str) -> Path:
    """Make the faiss file of ``kind`` in ``folder`` unless it is there; returns its directory. Says so before."""
    target = faiss_folder(folder, kind)
    if target.exists():
        return target
    faiss = require("faiss", "train", f"building an index of kind {kind!r}")
    part = folder / f".faiss_{kind}.part"  # what a killed build left is used again
    part.mkdir(exist_ok=True)
    with build_lock(part, target):
        if not target.exists():
            print(f"{target}: building it for {len(vectors):,} passages; it stays there", file=sys.stderr)
            (_build_ivf if kind == "ivf" else _build_hnsw)(faiss, part, vectors)
            fsync_tree(part)
            os.rename(part, target)
    return target


def _saved(faiss: Any, folder: Path, vectors: ShardedVectors, kind: str) -> Any:
    file = build_faiss(folder, vectors, kind) / "index.faiss"
    with _faiss_quiet():
        return faiss.read_index(str(file), faiss.IO_FLAG_ONDISK_SAME_DIR if kind == "ivf" else 0)


@contextlib.contextmanager
def _faiss_quiet() -> Iterator[None]:
    """Nothing on the process's stdout meanwhile: faiss prints where its lists lie from C, and has no switch for it."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flat(faiss: Any, vectors: ShardedVectors) -> Any:
    index = faiss.IndexFlatIP(vectors.dim)
    for _, block in vectors.blocks():
        index.add(np.ascontiguousarray(block))
    return index


def _build_hnsw(faiss: Any, part: Path, vectors: ShardedVectors) -> None:
    storage = "SQfp16" if vectors.shards[0].dtype == np.float16 else "Flat"
    index = faiss.index_factory(vectors.dim, f"HNSW{HNSW_NEIGHBOURS},{storage}", faiss.METRIC_INNER_PRODUCT)
    for _, block in track(vectors.blocks(), "linking passages"):
        block = np.ascontiguousarray(block)
        if not index.is_trained:
            index.train(block)  # float16 needs no statistics; faiss wants the call
        index.add(block)
    faiss.write_index(index, str(part / "index.faiss"))


def _build_ivf(faiss: Any, part: Path, vectors: ShardedVectors) -> None:
    """Centres from a sample, then one file of lists a shard, then all merged into one file on disk."""
    from faiss.contrib.ondisk import merge_ondisk

    centres = part / "trained.faiss"
    if not centres.exists():
        _write(faiss, _train_ivf(faiss, vectors), centres)
    files = []
    for number, (start, shard) in enumerate(
        track(list(zip(vectors.starts.tolist(), vectors.shards, strict=False)), "sorting passages into lists")
    ):
        files.append(part / f"lists_{number:05d}.faiss")
        if files[-1].exists():
            continue
        index = faiss.read_index(str(centres))
        for first in range(0, len(shard), 1 << 14):
            block = np.ascontiguousarray(shard[first : first + (1 << 14)], dtype=np.float32)
            index.add_with_ids(block, np.arange(start + first, start + first + len(block)))
        _write(faiss, index, files[-1])
    merged = faiss.read_index(str(centres))
    with _faiss_quiet():
        merge_ondisk(merged, [str(file) for file in files], str(part / "lists.ivfdata"))
    _write(faiss, merged, part / "index.faiss")
    for file in (*files, centres):
        file.unlink()


def _train_ivf(faiss: Any, vectors: ShardedVectors) -> Any:
    lists = list_count(len(vectors))
    storage = "SQfp16" if vectors.shards[0].dtype == np.float16 else "Flat"
    index = faiss.index_factory(vectors.dim, f"IVF{lists},{storage}", faiss.METRIC_INNER_PRODUCT)
    wanted = min(len(vectors), lists * _TRAINING_ROWS)
    rows = np.sort(np.random.default_rng(_SEED).choice(len(vectors), wanted, replace=False))
    sample = np.concatenate(
        [vectors.take(part).astype(np.float32) for part in np.array_split(rows, 1 + wanted // 4096)]
    )
    index.cp.seed = _SEED
    index.train(sample)
    return index


def _write(faiss: Any, index: Any, file: Path) -> None:
    """Under a temporary name first, so that a file that exists is whole."""
    faiss.write_index(index, str(file) + ".tmp")
    os.replace(str(file) + ".tmp", file)


def _check_gpu(faiss: Any, kind: str, device: str) -> None:
    if kind == "hnsw":
        raise ValueError("tool.device: expected 'cpu' with tool.method 'hnsw', which faiss has on the CPU only")
    if getattr(faiss, "get_num_gpus", lambda: 0)() == 0:
        raise ValueError(f"tool.device: expected 'cpu', for this faiss sees no GPU (faiss-gpu does), got {device!r}")
