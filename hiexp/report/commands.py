"""``hiexp report``: one HTML page, and on request one PNG, from run directories."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command; heavy imports wait until it runs."""
    parser = subparsers.add_parser("report", help="write one HTML page about training runs and evaluations")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directory (several are compared as arms), or what hiexp eval wrote (DIR of --out, FILE of --json)",
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="HTML file (default: report.html)")
    parser.add_argument("--png", metavar="FILE", help="also write the comparison as one picture")
    parser.add_argument(
        "--threshold", type=float, help="training reward for 'steps to' (default: 90%% of the best arm's plateau)"
    )
    parser.add_argument("--samples", type=int, default=6, help="trajectories shown per run (default: 6)")
    parser.set_defaults(func=_report)


def _report(args: argparse.Namespace) -> int:
    from hiexp.report.evaluations import is_evaluation
    from hiexp.report.page import report
    from hiexp.report.plots import comparison_png

    print(report(args.runs, args.out, threshold=args.threshold, samples=args.samples))
    if args.png:
        comparison_png([run for run in args.runs if not is_evaluation(run)], args.png)
        print(args.png)
    return 0
