"""What the agent's commands share: from arguments to a config, a snapshot, and an actor. Heavy ones load late."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.io import DataError, atomic_write

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.act import Actor
    from hiexp.rl.config import TrainConfig

SETTINGS = "settings.json"


def check_counts(flags: Mapping[str, int | None]) -> None:
    """ValueError for a flag below 1."""
    for name, value in flags.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def config_of(args: argparse.Namespace, questions: str) -> TrainConfig:
    """The config file, or the defaults, changed by the flags; ``questions`` is the key of ``task`` they belong to."""
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.config_parse import override_keys, read_yaml

    values = override_keys({}, args.set) if args.config is None else read_yaml(args.config, args.set)
    source = args.questions[0] if isinstance(args.questions, list) else args.questions
    limit = ("task", "train_limit") if questions == "train" else ("evaluation", "questions")
    flags: list[tuple[tuple[str, str], Any]] = [
        (("model", "path"), args.model), (("task", questions), source), (("tool", "corpus"), args.corpus),
        (("experience", "hek"), args.hek), (("rollout", "dialect"), args.dialect), (limit, args.limit),
        (("run", "seed"), args.seed), (("task", "scorer"), getattr(args, "scorer", None)),
    ]  # fmt: skip
    if args.config is None:
        values.setdefault("tool", {}).setdefault("kind", "none" if args.corpus is None else "bm25")
        # Without a file that says otherwise an evaluation is over all questions.
        values.setdefault("evaluation", {}).setdefault("questions", sys.maxsize)
    for (stage, key), value in flags:
        if value is not None:
            values.setdefault(stage, {})[key] = value
    task = values.setdefault("task", {})
    if not task.get(questions):
        raise ValueError(f"task.{questions}: expected questions; give --questions FILE or a config that names them")
    task.setdefault("train", task[questions])
    return TrainConfig.from_dict(values, args.config or "command line")


def read_snapshot(config: TrainConfig) -> Snapshot | None:
    """The current snapshot of the HEK that the config names, or None."""
    if config.experience.hek is None:
        return None
    from hiexp.experience.store import HEK

    with HEK.open(config.experience.hek, mode="r") as hek:
        return hek.snapshot()


def open_tool(config: TrainConfig) -> Tool:
    """The search tool of the config; its index is made where there is none yet."""
    import torch

    from hiexp.rl.setup import make_tool

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return make_tool(config.tool)


def tool_identity(tool: Tool) -> str:
    """What its results depend on besides the settings: the content of the corpus, not its path."""
    return str(getattr(tool, "identity", tool.name))


def make_actor(config: TrainConfig, tool: Tool) -> Actor:
    """Model and tokenizer of the config, ready to answer with ``tool``."""
    from hiexp.rl.act import Actor
    from hiexp.rl.make_engine import make_engine
    from hiexp.rl.model import quiet_transformers

    quiet_transformers()
    return Actor(make_engine(config), tool, config)


@contextmanager
def output_directory(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """``out`` with ``settings`` beside what will lie there; no other process writes into it within the block.

    Raises:
        ValueError: it was made with other settings, the differing keys are listed; or another process is at work in it.
        DataError: the folder holds something else, or a damaged settings file.
    """
    from hiexp.rl.run_directory import directory_lock

    _check_output(out, settings)  # before the lock: nothing is written into a folder of somebody else's
    with directory_lock(out):
        if not _check_output(out, settings):
            atomic_write(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
        yield out


def _check_output(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` was made with ``settings``; False where it holds no result yet."""
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.config_parse import differing_keys

    file = out / SETTINGS
    held = {path.name for path in out.iterdir()} - {".lock"} if out.is_dir() else set()
    if not held:
        return False
    if SETTINGS not in held:
        raise DataError(f"--out {out}: expected an empty directory or earlier rollouts; it holds no {SETTINGS}")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    # A setting that is not stored did not exist then.
    lines = differing_keys(stored, settings, TrainConfig().to_dict())
    # Settings alone are what a command left that failed before its first result.
    if lines and held != {SETTINGS}:
        raise ValueError(f"--out {out}: holds rollouts with other settings ({'; '.join(lines)}); choose another")
    return not lines


def number(value: Any) -> str:
    """A figure as tables show it."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
