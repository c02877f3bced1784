"""From settings to a search tool over a corpus: the index that is there, or one that is built now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.corpus import corpus_identity
from hiexp.agent.index_folder import check_plan, read_manifest

if TYPE_CHECKING:
    from hiexp.agent.bm25 import Bm25Tool
    from hiexp.agent.dense import DenseTool


def open_index(
    folder: str | Path, *, corpus: str | Path | None = None, kind: str | None = None, encoder: str | None = None,
    device: str = "cpu", **options: Any,
) -> Bm25Tool | DenseTool:  # fmt: skip
    """The tool over an index that ``hiexp index`` made.

    Args:
        corpus: the file it has to be of; None takes any.
        kind: ``bm25`` or ``dense``; None takes what it is.
        encoder: spec of the encoder of queries; None: the one it was built with.
        options: of :class:`hiexp.agent.dense.DenseTool`.

    Raises:
        DataError: no index there. ValueError: it is of another corpus, kind or encoder; the message names both.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted: dict[str, Any] = {"settings": {} if kind is None else {"kind": kind}}
    if corpus:
        wanted["corpus"] = corpus_identity(corpus)
    check_plan(folder, manifest, wanted)
    if manifest["settings"]["kind"] == "bm25":
        from hiexp.agent.bm25 import Bm25Tool

        return Bm25Tool(folder)
    from hiexp.agent.dense import DenseTool
    from hiexp.experience.encoder import make_encoder

    made = make_encoder(encoder or manifest.get("encoder_spec") or "hashing", device=device)
    return DenseTool(folder, made, device=device, **options)


def search_corpus(
    corpus: str | Path, *, kind: str, encoder: str | None = None, cache_dir: str | Path | None = None,
    device: str = "cpu", **options: Any,
) -> Bm25Tool | DenseTool:  # fmt: skip
    """The tool over a corpus file, its index taken from the cache or built.

    Raises:
        DataError: unusable corpus; the message names file and line.
    """
    if kind == "bm25":
        from hiexp.agent.bm25 import Bm25Tool

        return Bm25Tool.from_corpus(corpus, cache_dir)
    from hiexp.agent.dense import DenseTool
    from hiexp.experience.encoder import make_encoder

    made = make_encoder(encoder or "hashing", device=device)
    return DenseTool.from_corpus(corpus, made, cache_dir, device=device, **options)
