"""What ``hiexp compare`` does: HEKs side by side, and, with a model, the scores it reaches with each of them.

Without a model: what is in each HEK, what it cost, what it refused, how alike the lessons are, what it would serve to
the questions. With one, every question is answered without experience and with each HEK; differences are paired by
question, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.command_config import (
    check_counts,
    config_of,
    make_actor,
    number,
    open_tool,
    output_directory,
    tool_identity,
)
from hiexp.agent.eval_command import check_evaluation
from hiexp.agent.eval_store import eval_settings
from hiexp.io import atomic_write

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.experience.store import HEK
    from hiexp.rl.config import TrainConfig
    from hiexp.tasks.question import Question

_NONE = "no HEK"


def compare_command(args: argparse.Namespace) -> int:
    """``hiexp compare``."""
    check_counts({"--limit": args.limit, "--samples": args.samples})
    if len(set(args.heks)) != len(args.heks):
        raise ValueError(f"HEK: expected different files, got {' '.join(args.heks)}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json: no such folder: {Path(args.json).parent}")
    answering = bool(args.model or args.config)
    if args.out and not answering:
        raise ValueError("--out: keeps rollouts, and takes a model: give --model or --config")
    config = config_of(args, "evaluation") if answering or args.questions else None
    from hiexp.experience.store import HEK

    with ExitStack() as stack:
        heks = {path: stack.enter_context(HEK.open(path)) for path in args.heks}
        result = _contents(heks, None if config is None else _questions(config))
        _print_contents(result)
        if answering and config is not None:
            snapshots: dict[str, Snapshot | None] = {_NONE: None}
            snapshots.update({path: hek.snapshot() for path, hek in heks.items()})
            result["scores"] = _scores(config, snapshots, args)
            _print_scores(result["scores"])
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def _questions(config: TrainConfig) -> list[Question]:
    from hiexp.tasks.qa import load_questions

    return load_questions(config.task.evaluation, config.task.evaluation_split)[: config.evaluation.questions]


def _contents(heks: Mapping[str, HEK], questions: Sequence[Question] | None) -> dict[str, Any]:
    from hiexp.experience.compare import describe, overlap, serving

    paths = list(heks)
    return {
        "heks": {path: describe(hek) for path, hek in heks.items()},
        "serving": {path: serving(hek, questions) for path, hek in heks.items()} if questions else None,
        "overlap": [
            {"a": a, "b": b, **overlap(heks[a], heks[b])} for place, a in enumerate(paths) for b in paths[place + 1 :]
        ],
    }


# Answers


def _scores(config: TrainConfig, snapshots: Mapping[str, Snapshot | None], args: argparse.Namespace) -> dict[str, Any]:
    """What each arm scores; the first, without HEK, is what the others are compared with."""
    from hiexp.agent.eval_run import Evaluator, load_sets
    from hiexp.rl.setup import check_leaks
    from hiexp.tasks.statistics import paired_difference

    check_evaluation(config, args.samples)
    sets = load_sets(config, [config.task.evaluation], judged=False)
    if len(sets) != 1:
        raise ValueError(f"--questions: expected one data set to compare on, got {len(sets)}")
    asked = sets[0]
    for snapshot in snapshots.values():
        check_leaks(snapshot, asked.questions)
    ids = {name: None if snapshot is None else snapshot.id for name, snapshot in snapshots.items()}
    tool = open_tool(config)
    settings = {**eval_settings(config, None, tool_identity(tool)), "arms": ids}
    result: dict[str, Any] = {}
    reference: dict[str, Any] = {}
    with nullcontext() if args.out is None else output_directory(Path(args.out), settings) as out:
        engine = make_actor(config, tool).engine
        for place, (name, snapshot) in enumerate(snapshots.items()):
            arm = "without_hek" if snapshot is None else "with_hek"
            folder = None if out is None else out / f"arm_{place}"
            told, values = Evaluator(
                engine, tool, config, snapshot, [arm], args.samples, None, folder
            ).evaluate(asked)  # fmt: skip
            reference = reference or values[arm]
            difference = {score: paired_difference(found, reference[score]) for score, found in values[arm].items()}
            result[name] = {**told[arm], "difference": None if snapshot is None else difference}
    return result


# Tables


def _print_contents(result: Mapping[str, Any]) -> None:
    heks = result["heks"]
    rows: dict[str, list[str]] = {
        "lessons E1 / patterns E2 / strategies E3": [
            " / ".join(str(one["entries"][level]) for level in ("E1", "E2", "E3")) for one in heks.values()
        ],
        "questions behind the lessons": [str(one["questions"]) for one in heks.values()],
        "words of a lesson": [number(one["words"]) for one in heks.values()],
        "entries in quarantine": [str(one["quarantined_entries"]) for one in heks.values()],
        "replies that could not be used": [str(one["rejected_replies"]) for one in heks.values()],
    }
    for title, key in (("tokens read and written", "tokens"), ("seconds", "seconds"), ("cost", "cost")):
        rows[title] = [_total(one["reflectors"], key) for one in heks.values()]
    for level in ("E1", "E2", "E3") if result["serving"] else ():
        cells = [(one["served"][level], one["similarity"][level]) for one in result["serving"].values()]
        rows[f"questions served with {level}, similarity"] = [f"{share:.3f}, {number(near)}" for share, near in cells]
    if result["serving"]:
        rows["entries that give an answer away"] = [str(one["leaks"]) for one in result["serving"].values()]
    _print_table(list(heks), rows)
    for pair in result["overlap"]:
        same, near = number(pair["same_text"]), number(pair["similarity"])
        print(
            f"{pair['a']} and {pair['b']}: {pair['common_questions']} questions in both; the same lesson for {same} "
            f"of them, mean similarity of the nearest lessons {near}"
        )


def _total(reflectors: Mapping[str, Mapping[str, float]], key: str) -> str:
    """A sum over the reflectors of one HEK; ``-`` where none was counted, or a model was asked at unknown prices."""
    if not reflectors:
        return "-"
    if key == "cost":
        costs = [one[key] for one in reflectors.values() if one["requests"]]  # the others cost nothing
        return f"{sum(costs):,.4f}" if costs and all(costs) else "-"
    if key == "tokens":
        sums = [int(sum(one[name] for one in reflectors.values())) for name in ("prompt_tokens", "completion_tokens")]
        return f"{sums[0]:,} / {sums[1]:,}"
    return f"{sum(one[key] for one in reflectors.values()):,.2f}"


def _print_scores(scores: Mapping[str, Mapping[str, Any]]) -> None:
    names = [name for name in scores[_NONE]["intervals"] if "_pass@" not in name]
    rows = {}
    for score in names:
        rows[score] = [
            "{:.3f} [{:.3f}, {:.3f}]".format(arm[score], *arm["intervals"][score]) for arm in scores.values()
        ]
        rows[f"{score}, minus no HEK"] = [
            "" if arm["difference"] is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*arm["difference"][score])
            for arm in scores.values()
        ]
    for name in ("searches_per_answer", "answered"):
        rows[name] = [number(arm[name]) for arm in scores.values()]
    print(f"\n{scores[_NONE]['n']} answers in each column; 95 % bootstrap intervals over questions")
    _print_table(list(scores), rows)


def _print_table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    short = [Path(name).name for name in names]
    heads = short if len(set(short)) == len(short) else names
    first = max(map(len, rows))
    widths = [max(len(head), *(len(cells[column]) for cells in rows.values())) for column, head in enumerate(heads)]
    print(" " * first, *(head.rjust(width) for head, width in zip(heads, widths, strict=True)), sep="  ")
    for title, cells in rows.items():
        print(title.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), sep="  ")
