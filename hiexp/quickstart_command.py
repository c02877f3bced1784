"""``hiexp quickstart``: watch a tiny agent learn from its own experience."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add ``quickstart`` to the command line."""
    parser = subparsers.add_parser(
        "quickstart",
        help="watch a tiny agent learn from its own experience, from nothing to a report, in minutes on two CPU cores",
        description="Build a small world and a tiny policy, distil the policy's own rollouts into a HEK, train it with "
        "and without the HEK, and compare. A stopped or killed quickstart continues with the same command.",
    )
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="directory (default: runs/quickstart)")
    parser.add_argument("--config", metavar="FILE", help="settings, see configs/quickstart.yaml")
    parser.add_argument("--seed", type=int, help="decides weights, worlds and samples")
    parser.add_argument("--steps", type=int, help="GRPO steps of each arm")
    parser.add_argument(
        "--short",
        action="store_true",
        help="every stage in about a minute, too short to learn: its numbers mean nothing",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from dataclasses import replace

    from hiexp.quickstart.config import QuickstartConfig

    config = QuickstartConfig.from_yaml(args.config) if args.config else QuickstartConfig()
    if args.short:
        config = config.short()
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {args.steps}")
    if args.steps is not None:
        config = replace(config, train=replace(config.train, run=replace(config.train.run, steps=args.steps)))

    from hiexp.quickstart.job import quickstart

    quickstart(config, args.out, say=_say)
    if args.short:
        _say("This was the short form: it shows that every stage runs. Its numbers mean nothing.")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
