"""Dense search in process: passages and queries as unit vectors, exact nearest neighbours, vectors cached on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.corpus import DocumentStore, cached_index, store_documents
from hiexp.agent.tools import Document
from hiexp.experience.encoder import Encoder
from hiexp.experience.index import ExactIndex
from hiexp.progress import track

_VECTORS = "vectors.npy"
_ENCODE_ROWS = 1024  # passages encoded at a time
_SCORE_CELLS = 1 << 26  # float32 scores held at a time: 256 MB


class DenseTool:
    """A search tool over one corpus and encoder. Build it with :meth:`from_corpus`."""

    name = "dense"

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.identity = f"dense:{folder.name}"  # the folder is named by corpus and settings
        self.documents = DocumentStore(folder)
        self.encoder = encoder
        vectors: NDArray[np.float32] = np.load(folder / _VECTORS, mmap_mode="r")  # (n, d)
        self._index = ExactIndex(vectors, np.full(len(vectors), -np.inf))  # any passage may be returned, however far

    @classmethod
    def from_corpus(cls, path: str | Path, encoder: Encoder, cache_dir: str | Path | None = None) -> DenseTool:
        """The tool over a JSONL(.gz) corpus (see :func:`hiexp.agent.corpus.read_corpus`).

        Raises:
            DataError: unusable corpus; the message names file and line.
            ValueError: the encoder does not return one finite vector of its dimension per text.
        """
        settings = {"kind": "dense", "encoder": encoder.id}
        return cls(cached_index(path, cache_dir, settings, lambda folder: _build(path, folder, encoder)), encoder)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The ``top_k`` nearest passages of each query; ties go to the earlier passage."""
        return [[document for document, _ in found] for found in self.search_scored(queries, top_k)]

    def search_scored(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Document, float]]]:
        """:meth:`search` with the cosine similarity of each passage."""
        vectors = _encode(self.encoder, list(queries))
        rows = max(1, _SCORE_CELLS // max(1, len(self.documents)))
        found: list[list[tuple[Document, float]]] = []
        for start in range(0, len(vectors), rows):
            part = vectors[start : start + rows]
            ranked = self._index.search(part, top_k, [()] * len(part))
            found += [[(self.documents[row], float(score)) for row, score in best] for best in ranked]
        return found


def _build(corpus: str | Path, folder: Path, encoder: Encoder) -> None:
    n = sum(1 for _ in store_documents(corpus, folder))
    documents = DocumentStore(folder)
    # Written block by block: the vectors of a large corpus need not fit into memory.
    vectors = np.lib.format.open_memmap(folder / _VECTORS, "w+", np.float32, (n, encoder.dim))
    for start in track(range(0, n, _ENCODE_ROWS), "encoding passages"):
        block = [documents[row] for row in range(start, min(n, start + _ENCODE_ROWS))]
        vectors[start : start + len(block)] = _encode(encoder, [f"{doc.title}\n{doc.text}" for doc in block])
    vectors.flush()


def _encode(encoder: Encoder, texts: list[str]) -> NDArray[np.float32]:
    vectors = np.ascontiguousarray(encoder.encode(texts), dtype=np.float32)
    if vectors.shape != (len(texts), encoder.dim) or not np.isfinite(vectors).all():
        raise ValueError(
            f"encoder: expected {len(texts)} finite vectors of length {encoder.dim} from {encoder.id!r}, "
            f"got shape {vectors.shape}"
        )
    return vectors
