"""The command line: ``hiexp COMMAND``. Each layer registers its own commands; nothing heavy loads before one runs.

A user error (bad value, bad file, missing extra, full disk) ends in one line on stderr and exit code 2; ``--traceback``
shows where it came from.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import hiexp

# In the order of the data flow; each module offers register(subparsers).
_COMMAND_MODULES = (
    "hiexp.quickstart_command",
    "hiexp.evidence_command",
    "hiexp.agent.commands",
    "hiexp.agent.index_command",
    "hiexp.experience.commands",
    "hiexp.rl.commands",
    "hiexp.report.commands",
    "hiexp.bench",
    "hiexp.doctor",
)


class _Parser(argparse.ArgumentParser):
    """Without abbreviations: a misspelt flag must not be taken for another one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as one argparse parser."""
    parser = _Parser(
        prog="hiexp",
        description="Train search agents on hierarchical experience knowledge (HEK) drawn from their own trajectories.",
        epilog="Start with: hiexp quickstart",
    )
    parser.add_argument("--version", action="version", version=f"hiexp {hiexp.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMAND_MODULES:
        importlib.import_module(module).register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.func(arguments))
    except BrokenPipeError:
        # The reader (head, less) went away: not an error; stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("hiexp: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if arguments.traceback:
            raise
        print(f"hiexp: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
