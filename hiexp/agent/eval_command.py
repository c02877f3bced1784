"""What ``hiexp eval`` does: arms of a model over one or more data sets, or the scores of stored logs.

Every result states what it depends on: model, dialect, scorer, corpus, snapshot, sampling, judge. Intervals are 95 %
bootstrap intervals over questions; differences between arms are paired by question.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hiexp
from hiexp.agent.command_config import (
    check_counts,
    config_of,
    make_actor,
    open_tool,
    output_directory,
    read_snapshot,
    tool_identity,
)
from hiexp.io import atomic_write

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.config import TrainConfig
    from hiexp.tasks.judge import Judge


def eval_command(args: argparse.Namespace) -> int:
    """``hiexp eval``."""
    if args.list_sets:
        from hiexp.tasks.data_sets import data_set_table

        print(data_set_table())
        return 0
    check_counts({"--limit": args.limit, "--samples": args.samples})
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json: no such folder: {Path(args.json).parent}")
    if args.trajectories:
        from hiexp.agent.eval_logs import log_lines

        _check_no_model_flags(args)
        result = _eval_trajectories(args)
        lines = list(log_lines(result))
    else:
        from hiexp.agent.eval_table import result_lines

        result = _eval_model(args)
        lines = list(result_lines(result))
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    print("\n".join(lines))
    return 0


def _eval_model(args: argparse.Namespace) -> dict[str, Any]:
    from hiexp.agent.arms import choose_arms
    from hiexp.agent.eval_run import Evaluator, load_sets, macro_average
    from hiexp.agent.eval_store import RESULT, eval_settings
    from hiexp.rl.setup import check_leaks

    config = config_of(args, "evaluation")
    samples = args.samples or 1
    check_evaluation(config, samples)
    snapshot = read_snapshot(config) if config.evaluation.with_hek else None
    arms = choose_arms(args.arms, snapshot is not None, config.rollout.dialect)
    sets = load_sets(config, args.questions or [config.task.evaluation], args.judge is not None)
    check_leaks(snapshot, [question for one in sets for question in one.questions])
    tool = open_tool(config)
    settings = eval_settings(config, snapshot, tool_identity(tool))
    with nullcontext() if args.out is None else output_directory(Path(args.out), settings) as out:
        judge = _make_judge(args, None if out is None else out / "judge.jsonl")
        evaluator = Evaluator(make_actor(config, tool).engine, tool, config, snapshot, arms, samples, judge, out)
        done = {one.name: evaluator.evaluate(one) for one in sets}
        scores = {name: values for name, (_, values) in done.items()}
        result = {
            **_conditions(config, snapshot, tool_identity(tool), samples),
            "judge": _judge_told(judge), "arms": arms, "sets": {name: told for name, (told, _) in done.items()},
            "macro": macro_average(scores, {one.name: one.headline for one in sets}) if len(sets) > 1 else None,
        }  # fmt: skip
        if out is not None:
            atomic_write(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def check_evaluation(config: TrainConfig, samples: int) -> None:
    if config.evaluation.questions < 1:
        raise ValueError("evaluation.questions: expected at least 1 to evaluate, got 0 (--limit N sets it)")
    if samples > 1 and config.evaluation.temperature == 0.0:
        raise ValueError(
            f"--samples {samples}: expected evaluation.temperature above 0; at 0 all answers to a question are the same"
        )


def _conditions(config: TrainConfig, snapshot: Snapshot | None, corpus_id: str, samples: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "hiexp": hiexp.__version__, "model": config.model.path, "server": config.rollout.server or None,
        "server_api": config.rollout.server_api if config.rollout.server else None,
        "logprobs": config.rollout.server_api != "chat",
        "dialect": config.rollout.dialect, "scorer": config.task.scorer, "tool": config.tool.kind,
        "corpus": config.tool.corpus or config.tool.url, "corpus_id": corpus_id, "top_k": config.tool.top_k,
        "max_turns": config.rollout.max_turns, "samples": samples, "temperature": config.evaluation.temperature,
        "seed": config.run.seed, "snapshot_id": None if snapshot is None else snapshot.id,
    }  # fmt: skip


def _make_judge(args: argparse.Namespace, cache: Path | None) -> Judge | None:
    """The judge that ``--judge openai:MODEL`` names, after it answered once."""
    if args.judge is None:
        if args.judge_url is not None:
            raise ValueError("--judge-url: expected --judge openai:MODEL beside it")
        return None
    from hiexp.tasks.judge import openai_judge

    kind, _, model = args.judge.partition(":")
    if kind != "openai" or not model:
        raise ValueError(f"--judge: expected openai:MODEL, got {args.judge!r}")
    judge = openai_judge(model, args.judge_url, cache)
    judge.check()
    return judge


def _judge_told(judge: Judge | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    from hiexp.tasks.judge import PROMPT_VERSION

    return {"model": judge.name, "prompt": PROMPT_VERSION, "asked": judge.asked, "failures": judge.failures}


def _check_no_model_flags(args: argparse.Namespace) -> None:
    """Stored answers are not answered again: a flag about that would be ignored."""
    given = {
        "CONFIG": args.config, "--model": args.model, "--hek": args.hek, "--set": args.set, "--out": args.out,
        "--samples": args.samples, "--seed": args.seed, "--arms": args.arms,
    }  # fmt: skip
    unused = [flag for flag, value in given.items() if value]
    if unused:
        raise ValueError(f"--trajectories: scores stored answers and takes no {', '.join(unused)}")


def _eval_trajectories(args: argparse.Namespace) -> dict[str, Any]:
    from hiexp.agent.eval_logs import evaluate_logs
    from hiexp.tasks.qa import load_questions

    # Here the dialect of the logs matters for its normalisation alone.
    dialect = args.scorer or args.dialect or "hiexp"
    known = [question for source in args.questions or [] for question in load_questions(source)]
    judge = _make_judge(args, None)
    return {
        **evaluate_logs(args.trajectories, dialect, known, args.limit, judge),
        "dialect": dialect,
        "corpus": args.corpus or "that of the logs, which they do not name",
        **({} if judge is None else {"judge_model": _judge_told(judge)}),
        "trajectories": [str(path) for path in args.trajectories],
    }
