"""What ``hiexp eval`` does: scores of a model with and without HEK over one or more data sets, or of stored logs.

Every result states what it depends on: model, dialect, scorer, corpus, snapshot, sampling. Intervals are 95 % bootstrap
intervals over questions; the difference of the arms is paired by question.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.command_config import check_counts, config_of, make_actor, number, read_snapshot
from hiexp.io import atomic_write, write_jsonl

if TYPE_CHECKING:
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.evaluate import Arm

_ARMS = {"without_hek": "without HEK", "with_hek": "with HEK"}


def eval_command(args: argparse.Namespace) -> int:
    """``hiexp eval``."""
    check_counts({"--limit": args.limit, "--samples": args.samples})
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json: no such folder: {Path(args.json).parent}")
    if args.trajectories:
        _check_no_model_flags(args)
        result = _eval_trajectories(args)
        _print_table({"logs": result})
    else:
        result = _eval_model(args)
        for name, part in result["sets"].items():
            print(f"\n{name}")
            _print_table({text: part[arm] for arm, text in _ARMS.items() if part[arm] is not None}, part["difference"])
        print(f"\n{_statement(result)}")
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def _eval_model(args: argparse.Namespace) -> dict[str, Any]:
    config = config_of(args, "evaluation")
    snapshot = read_snapshot(config) if config.evaluation.with_hek else None
    sources = args.questions or [config.task.evaluation]
    from hiexp.rl.evaluate import evaluation_batches
    from hiexp.rl.setup import make_task

    tasks: dict[str, Any] = {}
    for source in sources:
        task = make_task(replace(config.task, evaluation=source, train=source), config.run.seed)
        tasks[_set_name(source, tasks)] = (task, evaluation_batches(task, config.evaluation.questions))
    actor = make_actor(config)
    sets = {}
    for name, (task, batches) in tasks.items():
        sets[name] = _eval_set(actor, config, task, batches, snapshot, args.samples)
        rollouts = sets[name].pop("rollouts")
        if args.out:
            _write_rollouts(Path(args.out) / name, rollouts)
    return {
        "model": config.model.path, "dialect": config.rollout.dialect, "scorer": config.task.scorer,
        "tool": config.tool.kind, "corpus": config.tool.corpus or config.tool.url, "samples": args.samples,
        "temperature": config.evaluation.temperature, "seed": config.run.seed,
        "snapshot_id": None if snapshot is None else snapshot.id, "sets": sets,
    }  # fmt: skip


def _set_name(source: str, taken: Mapping[str, Any]) -> str:
    name = Path(source.replace(":", "/")).name.split(".")[0]
    return name if name not in taken else f"{name}_{len(taken) + 1}"


def _eval_set(actor: Any, config: TrainConfig, task: Any, batches: Any, snapshot: Any, samples: int) -> dict[str, Any]:
    from hiexp.rl.evaluate import run_arm

    def arm(seen: Any) -> Arm:
        return run_arm(
            lambda questions, tool, shown: actor.answer(questions, tool, shown, policy_step=0),
            task, batches, seen, metric=config.task.metric, malformed_reward=config.task.malformed_reward,
            samples=samples,
        )  # fmt: skip

    arms = {"without_hek": arm(None), "with_hek": None if snapshot is None else arm(snapshot)}
    told = {name: None if one is None else _told(one) for name, one in arms.items()}
    return {**told, "difference": _difference(arms), "rollouts": arms}


def _told(arm: Arm) -> dict[str, Any]:
    """Means, intervals of the scores, tokens, and for several samples pass@k of the scores that are 0 or 1."""
    from hiexp.rl.evaluate import summarise
    from hiexp.tasks.statistics import bootstrap_interval, pass_at_k

    scores = arm.by_question()
    result: dict[str, Any] = dict(summarise(arm.rollouts, arm.rewards))
    result["seconds"] = arm.seconds
    result["sampled_tokens"] = float(np.mean([sum(rollout.loss_mask) for rollout in arm.rollouts]))
    for name, values in scores.items():
        if arm.samples > 1 and np.isin(values, (0.0, 1.0)).all():
            result[f"{name}_pass@{arm.samples}"] = pass_at_k(values == 1.0, arm.samples)
    result["intervals"] = {name: bootstrap_interval(values.mean(axis=1)) for name, values in scores.items()}
    return result


def _difference(arms: Mapping[str, Arm | None]) -> dict[str, tuple[float, float, float]] | None:
    """Per score: mean of with minus without HEK, paired by question, and its interval."""
    from hiexp.tasks.statistics import paired_difference

    with_hek, without = arms["with_hek"], arms["without_hek"]
    if with_hek is None or without is None:
        return None
    left, right = with_hek.by_question(), without.by_question()
    return {name: paired_difference(left[name].mean(axis=1), right[name].mean(axis=1)) for name in left}


def _write_rollouts(folder: Path, arms: Mapping[str, Arm | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        if arm is not None:
            write_jsonl(folder / f"{name}.jsonl.gz", [rollout.to_json() for rollout in arm.rollouts])


def _check_no_model_flags(args: argparse.Namespace) -> None:
    """Stored answers are not answered again: a flag about that would be ignored."""
    given = {
        "CONFIG": args.config, "--model": args.model, "--hek": args.hek, "--corpus": args.corpus, "--set": args.set,
        "--out": args.out, "--samples": args.samples > 1, "--seed": args.seed,
    }  # fmt: skip
    unused = [flag for flag, value in given.items() if value]
    if unused:
        raise ValueError(f"--trajectories: scores stored answers and takes no {', '.join(unused)}")


def _eval_trajectories(args: argparse.Namespace) -> dict[str, Any]:
    from hiexp.experience.importers import load_trajectories
    from hiexp.rl.metrics import mean
    from hiexp.tasks.qa import load_questions
    from hiexp.tasks.scorers import make_scorer
    from hiexp.tasks.statistics import bootstrap_interval

    # Here the dialect of the logs matters for its normalisation alone.
    dialect = args.scorer or args.dialect or "hiexp"
    scorer = make_scorer(dialect)
    known = [question for source in args.questions or [] for question in load_questions(source)]
    groups = load_trajectories(args.trajectories, scorer=scorer, questions=known)
    attempts = [attempt for group in groups for attempt in group][: args.limit]
    scores = [scorer.score(attempt.answer, attempt.golden_answers) for attempt in attempts]
    by_question: dict[str, list[dict[str, float]]] = {}
    for attempt, score in zip(attempts, scores, strict=True):
        by_question.setdefault(attempt.question_id, []).append(score)
    return {
        **{metric: mean([score[metric] for score in scores]) for metric in scores[0]},
        "searches_per_answer": mean([len(attempt.queries()) for attempt in attempts]),
        "answered": mean([attempt.answer is not None for attempt in attempts]),
        "n": len(attempts),
        "intervals": {
            metric: bootstrap_interval([np.mean([score[metric] for score in group]) for group in by_question.values()])
            for metric in scores[0]
        },
        "dialect": dialect,
        "trajectories": [str(path) for path in args.trajectories],
    }


def _print_table(
    arms: Mapping[str, Mapping[str, Any]], difference: Mapping[str, Sequence[float]] | None = None
) -> None:
    metrics = list(dict.fromkeys(key for arm in arms.values() for key, value in arm.items() if _is_number(value)))
    width = max(len(metric) for metric in metrics)
    head = [f"{name:>22}" for name in arms] + (["difference".rjust(28)] if difference else [])
    print(" " * width, *head)
    for metric in metrics:
        cells = [f"{_with_interval(arm, metric):>22}" for arm in arms.values()]
        if difference and metric in difference:
            mean, low, high = difference[metric]
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]".rjust(28))
        print(f"{metric:<{width}}", *cells)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _with_interval(arm: Mapping[str, Any], metric: str) -> str:
    interval = arm.get("intervals", {}).get(metric)
    text = number(arm.get(metric))
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _statement(result: Mapping[str, Any]) -> str:
    corpus = f"{result['tool']} over {result['corpus']}" if result["corpus"] else "no search"
    return (
        f"{result['model']}; dialect {result['dialect']}, scorer {result['scorer']}; {corpus}; "
        f"{result['samples']} answer(s) a question at temperature {result['temperature']:g}; 95 % bootstrap intervals"
    )
