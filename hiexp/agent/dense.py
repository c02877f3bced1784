"""Dense search in process: passages and queries as unit vectors, the vectors on disk and memory-mapped.

The method that finds neighbours is a choice of the reader, not of the index: ``exact`` compares every row in bounded
memory, ``flat``, ``ivf`` and ``hnsw`` use faiss. Memory figures: :func:`memory_estimate`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hiexp.agent.corpus import DocumentStore
from hiexp.agent.dense_faiss import DEFAULT_EFFORT, FaissSearcher
from hiexp.agent.dense_index import SHARD_ROWS, ShardedVectors, build_vectors, encode_texts
from hiexp.agent.dense_search import ExactSearcher, Searcher
from hiexp.agent.index_folder import cached_index, check_plan, identity_of, index_at, read_manifest
from hiexp.agent.index_memory import DENSE_KINDS, MemoryEstimate, memory_estimate
from hiexp.agent.tools import Document, valid_text
from hiexp.experience.encoder import Encoder
from hiexp.io import DataError

__all__ = ["DenseTool", "MemoryEstimate", "build_dense_index", "e5_prefixes", "memory_estimate"]

_E5_NAME = re.compile(r"(?:^|[-_])e5(?:[-_]|$)(?!.*instruct)")


class DenseTool:
    """A search tool over one index and encoder. Build it with :meth:`from_corpus`, or open what ``hiexp index`` made.

    Args:
        folder: an index directory.
        method: ``exact``, ``flat``, ``ivf`` or ``hnsw``. Without faiss all of them are ``exact``, with a warning.
        effort: of ivf and hnsw, see :class:`hiexp.agent.dense_faiss.FaissSearcher`.
        device: of faiss, ``cpu`` or ``cuda``.
        query_prefix: put before every query; None: what the model's family wants (:func:`e5_prefixes`).

    Raises:
        DataError: no whole index there. ValueError: it was made with another encoder; the message names both.
    """

    name = "dense"

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        *,
        method: str = "exact",
        effort: int | None = None,
        device: str = "cpu",
        query_prefix: str | None = None,
    ) -> None:
        if method not in DENSE_KINDS:
            raise ValueError(f"method: expected one of {', '.join(DENSE_KINDS)}; got {method!r}")
        check_plan(folder, read_manifest(folder), {"settings": {"kind": "dense", "encoder": encoder.id}})
        self.documents = DocumentStore(folder)
        self.encoder = encoder
        self.query_prefix = e5_prefixes(encoder)[0] if query_prefix is None else query_prefix
        vectors = ShardedVectors(folder)
        if vectors.dim != encoder.dim or len(vectors) != len(self.documents):
            raise DataError(
                f"{folder}: expected {len(self.documents)} vectors of length {encoder.dim}, got {len(vectors)} of "
                f"length {vectors.dim}"
            )
        if method != "exact" and find_spec("faiss") is None:
            warnings.warn(f"no faiss here: dense search by {method!r} falls back to 'exact'", stacklevel=2)
            method = "exact"
        self.method = method
        self._searcher: Searcher = (
            ExactSearcher(vectors) if method == "exact" else FaissSearcher(folder, vectors, method, effort, device)
        )
        effort = effort or DEFAULT_EFFORT.get(method)
        self.identity = ":".join(["dense", identity_of(folder), method, str(effort or ""), self.query_prefix])

    @classmethod
    def from_corpus(
        cls,
        path: str | Path,
        encoder: Encoder,
        cache_dir: str | Path | None = None,
        *,
        dtype: str = "float32",
        passage_prefix: str | None = None,
        **options: Any,
    ) -> DenseTool:
        """The tool over a JSONL(.gz) corpus (see :func:`hiexp.agent.corpus.read_corpus`); ``options`` as above.

        Raises:
            DataError: unusable corpus; the message names file and line.
            ValueError: the encoder does not return one finite unit vector of its dimension per text.
        """
        settings, build = _plan(path, encoder, dtype, passage_prefix, SHARD_ROWS)
        return cls(cached_index(path, cache_dir, settings, build, resumable=True), encoder, **options)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """The ``top_k`` nearest passages of each query; ties go to the earlier passage."""
        return [[document for document, _ in found] for found in self.search_scored(queries, top_k)]

    def search_scored(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Document, float]]]:
        """:meth:`search` with the cosine similarity of each passage."""
        # No tokenizer takes half of a surrogate pair, and a model may write one.
        vectors = encode_texts(self.encoder, [self.query_prefix + valid_text(query) for query in queries])
        ranked = self._searcher.search(vectors, top_k)
        return [[(self.documents[row], score) for row, score in best] for best in ranked]


def build_dense_index(
    corpus: str | Path,
    encoder: Encoder,
    out: str | Path,
    *,
    dtype: str = "float32",
    passage_prefix: str | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Path:
    """Build the index of ``corpus`` in ``out``; after a kill the same call continues behind the last whole shard.

    Raises:
        ValueError: ``out`` holds the index of another corpus or encoder; DataError: unusable corpus or directory.
    """
    settings, build = _plan(corpus, encoder, dtype, passage_prefix, shard_rows)
    return index_at(out, corpus, settings, build, resumable=True, encoder_spec=encoder.spec)


def e5_prefixes(encoder: Encoder) -> tuple[str, str]:
    """What is put before queries and before passages: ``query: `` and ``passage: `` for the E5 family, else nothing.

    E5 models (arXiv 2212.03533) are trained with these words and lose several points without them. An encoder with a
    prefix of its own gets nothing more; neither do the instruction-tuned variants, which want a sentence.
    """
    name, _, own = encoder.spec.removeprefix("st:").partition("?prefix=")
    known = not own and encoder.spec.startswith("st:") and _E5_NAME.search(name.rstrip("/").rsplit("/", 1)[-1].lower())
    return ("query: ", "passage: ") if known else ("", "")


def _plan(
    corpus: str | Path, encoder: Encoder, dtype: str, passage_prefix: str | None, shard_rows: int
) -> tuple[dict[str, Any], Any]:
    if shard_rows < 1:
        raise ValueError(f"shard_rows: expected at least 1, got {shard_rows}")
    prefix = e5_prefixes(encoder)[1] if passage_prefix is None else passage_prefix
    settings = {
        "kind": "dense",
        "encoder": encoder.id,
        "passage_prefix": prefix,
        "dtype": dtype,
        "shard_rows": shard_rows,
    }
    return settings, lambda folder: build_vectors(corpus, folder, encoder, prefix, dtype, shard_rows)
