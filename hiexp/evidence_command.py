"""``hiexp evidence``: does experience help, measured against every control that could explain it away."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add ``evidence`` to the command line."""
    parser = subparsers.add_parser(
        "evidence",
        help="compare training with and without experience over seeds, with controls and intervals",
        description="Train a tiny agent in small worlds with and without experience, and with the controls that could "
        "explain a gain away; report paired differences with intervals. A stopped or killed study continues with the "
        "same command.",
    )
    parser.add_argument("--out", default="runs/evidence", metavar="DIR", help="directory (default: runs/evidence)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: 5; 1 with --short)")
    parser.add_argument("--arms", metavar="A,B,...", help="only these arms (default: all)")
    parser.add_argument("--steps", type=int, help="GRPO steps of each arm")
    parser.add_argument(
        "--short",
        action="store_true",
        help="every stage in about two minutes, too short to learn: its numbers mean nothing",
    )
    parser.add_argument(
        "--tables", action="store_true", help="train nothing: write tables and pictures from what is finished"
    )
    parser.add_argument("--results", metavar="DIR", help="where --tables writes (default: the directory of the study)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from dataclasses import replace

    if args.results and not args.tables:
        raise ValueError("--results: expected --tables with it")
    if args.tables:
        from hiexp.evidence.page import write_results

        _say(str(write_results(args.out, args.results)))
        return 0

    from hiexp.evidence.config import ARMS, EvidenceConfig

    seeds = (1 if args.short else 5) if args.seeds is None else args.seeds
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {args.steps}")
    config = EvidenceConfig().short() if args.short else EvidenceConfig()
    if args.steps is not None:
        config = replace(config, train=replace(config.train, run=replace(config.train.run, steps=args.steps)))

    from hiexp.evidence.job import evidence

    arms = args.arms.split(",") if args.arms else list(ARMS)
    evidence(config, args.out, range(seeds), arms, say=_say)
    if args.short:
        _say("This was the short form: it shows that every stage runs. Its numbers mean nothing.")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
