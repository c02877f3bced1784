"""The command ``hiexp index``: build a search index ahead of training, evaluation or serving.

hiexp index corpus.jsonl.gz --encoder st:intfloat/e5-base-v2 --dtype float16 --out indexes/wiki
hiexp index corpus.jsonl.gz --kind bm25 --out indexes/wiki-bm25
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "index",
        help="build a search index over a corpus",
        description="Write an index directory for tool.index and serve-retriever --index. A dense build that was "
        "killed continues behind its last whole shard when the same command runs again.",
    )
    parser.add_argument("corpus", help="JSONL(.gz) passages: id, title, text")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the index goes")
    parser.add_argument(
        "--kind",
        choices=("exact", "ivf", "hnsw", "bm25"),
        default="exact",
        help="vectors alone (exact), with a faiss index as well (ivf, hnsw), or BM25 (default: exact)",
    )
    parser.add_argument("--encoder", metavar="SPEC", help="of dense search: hashing[:DIM] or st:PATH_OR_NAME (hashing)")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the stored vectors (float32)")
    parser.add_argument("--passage-prefix", metavar="TEXT", help="before every passage (E5 models get theirs anyway)")
    parser.add_argument("--shard-size", type=int, metavar="N", help="passages per shard: what a kill can cost (100000)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="torch device of the encoder (cpu)")
    parser.set_defaults(func=index_command)


def index_command(args: argparse.Namespace) -> int:
    """``hiexp index``."""
    from hiexp.agent.corpus import DocumentStore

    folder = _bm25(args) if args.kind == "bm25" else _dense(args)
    documents = DocumentStore(folder)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    left_out = f", {documents.empty_passages:,} empty ones left out" if documents.empty_passages else ""
    print(f"{folder}: {len(documents):,} passages{left_out}, {used / 1e6:,.1f} MB")
    print(f"next: hiexp serve-retriever --index {folder}")
    return 0


def _bm25(args: argparse.Namespace) -> Path:
    from hiexp.agent.bm25 import build_bm25_index

    for flag in ("encoder", "dtype", "passage_prefix", "shard_size"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: belongs to dense indexes, got --kind bm25")
    return build_bm25_index(args.corpus, args.out)


def _dense(args: argparse.Namespace) -> Path:
    from hiexp._extras import require
    from hiexp.agent.dense import build_dense_index
    from hiexp.agent.dense_faiss import build_faiss
    from hiexp.agent.dense_index import SHARD_ROWS, ShardedVectors
    from hiexp.experience.encoder import make_encoder

    if args.kind != "exact":
        require("faiss", "train", f"--kind {args.kind}")  # before hours of encoding
    folder = build_dense_index(
        args.corpus,
        make_encoder(args.encoder or "hashing", device=args.device),
        args.out,
        dtype=args.dtype or "float32",
        passage_prefix=args.passage_prefix,
        shard_rows=SHARD_ROWS if args.shard_size is None else args.shard_size,
    )
    if args.kind != "exact":
        build_faiss(folder, ShardedVectors(folder), args.kind)
    return folder
