"""``hiexp train CONFIG``: train, or continue, the run that a YAML file describes."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def register(subparsers: Any) -> None:
    """Add ``train`` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a policy with GRPO conditioned on a HEK",
        description="Train the policy that CONFIG describes. A stopped or killed run continues with the same command. "
        "SIGTERM or SIGUSR1 end it behind a checkpoint, with exit code 75.",
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/hotpotqa_smollm2_cpu.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. run.steps=10"
    )
    parser.add_argument("--out", metavar="DIR", help="run directory (short for --set run.dir=DIR)")
    parser.add_argument(
        "--allow-changed", nargs="+", default=[], metavar="KEY",
        help="continue the run although these settings, e.g. algorithm.lr, have changed since it was started",
    )  # fmt: skip
    parser.add_argument("--help-config", action="store_true", help="list every setting with its default, then exit")
    parser.set_defaults(func=train)


def train(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.config_parse import describe

    if args.help_config:
        for key, default, sentence in describe(TrainConfig):
            print(f"{key} = {default}\n    {sentence}")
        return 0
    if args.config is None:
        raise ValueError("hiexp train: expected a YAML file; hiexp train --help-config lists the settings")
    overrides = [*args.set, *([f"run.dir={args.out}"] if args.out else [])]
    config = TrainConfig.from_yaml(args.config, overrides)
    # Heavy imports after the config was read: a typing error is told at once.
    from hiexp.rl.alarms import blind
    from hiexp.rl.model import quiet_transformers
    from hiexp.rl.preemption import EXIT_CODE, Preempted
    from hiexp.rl.trainer import GRPOTrainer

    quiet_transformers()
    trainer = GRPOTrainer(config, allow_changed=args.allow_changed)
    main = trainer.ranks.main
    if main:
        print(f"training in {config.run.dir} to step {config.run.steps}", *blind(config), sep="\n", file=sys.stderr)
    try:
        trainer.train(listener=report)
    except Preempted as stop:
        if main:
            print(f"hiexp train: {stop}", file=sys.stderr)
        return EXIT_CODE
    if main:
        print(f"done: {config.run.dir} (hiexp report {config.run.dir} draws its curves)")
    return 0


def report(kind: str, row: dict[str, Any]) -> None:
    """One line a step, one an evaluation arm and one an alarm on stdout."""
    if kind == "alarm":
        print(f"ALARM at step {row['step']}: {row['message']}", flush=True)
        return
    if kind == "evaluation":
        for arm in ("without_hek", "with_hek"):
            if row[arm] is not None:
                scores = "  ".join(f"{name} {_short(value)}" for name, value in row[arm].items())
                print(f"evaluation at step {row['step']}, {arm.replace('_hek', ' HEK')}: {scores}", flush=True)
        return
    keys = ("reward_mean", "advantage_var_raw", "zero_variance_share", "grad_norm", "kl_ref", "searches_per_answer")
    values = "  ".join(f"{key} {_short(row[key])}" for key in keys)
    print(f"step {row['step']}: {values}  ({row['seconds_step']:.1f} s)", flush=True)


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"
