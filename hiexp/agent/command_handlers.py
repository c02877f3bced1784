"""What ``hiexp rollout`` and ``serve-retriever`` do; commands.py holds their arguments.

Heavy modules load when one runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.command_config import (
    check_counts,
    config_of,
    make_actor,
    number,
    open_tool,
    output_directory,
    read_snapshot,
    tool_identity,
)
from hiexp.io import read_jsonl, write_jsonl

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.ledger import Prices
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.act import Actor
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.reward import QuestionTask
    from hiexp.tasks.question import Question

# Settings of a training run that rollouts do not depend on.
_UNUSED = ("run", "algorithm", "credit", "alarms", "evaluation")


def rollout_command(args: argparse.Namespace) -> int:
    """``hiexp rollout``."""
    from hiexp.experience.ledger import Prices
    from hiexp.rl.make_engine import check_logprobs

    prices = None if args.price is None else Prices(*args.price)
    check_counts({"--k": args.k, "--shard-questions": args.shard_questions, "--limit": args.limit})
    config = config_of(args, "train")
    check_logprobs(config, "hiexp rollout")
    k = config.rollout.group_size if args.k is None else args.k
    from hiexp.rl.setup import make_task
    from hiexp.tasks.qa import questions_digest

    task = make_task(config.task, config.run.seed)
    snapshot, tool = read_snapshot(config), open_tool(config)
    settings = {
        **_settings(config, k, args.shard_questions, snapshot),
        "tool_identity": tool_identity(tool), "questions_sha256": questions_digest(task.questions),
    }  # fmt: skip
    with output_directory(Path(args.out), settings) as out:
        total = _fill_shards(out, task, config, tool, k, args.shard_questions, snapshot)
    print(f"{len(total)} rollouts of {len(task.questions)} questions: {_mean_scores(total)}")
    print(_tokens(total, prices))
    print(f"next: hiexp distill {out}/shard_*.jsonl.gz --questions {config.task.train} --out {out}/hek.sqlite")
    return 0


def _fill_shards(
    out: Path,
    task: QuestionTask,
    config: TrainConfig,
    tool: Tool,
    k: int,
    shard_questions: int,
    snapshot: Snapshot | None,
) -> list[dict[str, Any]]:
    """Write the shards that are missing; the rollouts of all shards."""
    questions = task.questions
    starts = range(0, len(questions), shard_questions)
    todo = [start for start in starts if not _shard(out, start).exists()]
    if todo:
        actor = make_actor(config, tool)
        for start in todo:
            begin = time.perf_counter()
            part = range(start, min(start + shard_questions, len(questions)))
            rows = _shard_rollouts(actor, task, config, [(place, questions[place]) for place in part], k, snapshot)
            write_jsonl(_shard(out, start), rows)
            pace = f"{time.perf_counter() - begin:.1f} s"
            print(f"{_shard(out, start)}: {len(rows)} rollouts, mean {_mean_scores(rows)}  ({pace})", flush=True)
    return [row for start in starts for _, row in read_jsonl(_shard(out, start))]


def serve_command(args: argparse.Namespace) -> int:
    """``hiexp serve-retriever``."""
    from hiexp.agent.retriever_server import serve

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port: expected 0..65535, got {args.port}")
    if args.index is None and args.corpus is None:
        raise ValueError("--index or --corpus: expected one of them")
    tool = _served_tool(args)
    if args.cached_queries:
        from hiexp.agent.cached_tool import CachedTool

        tool = CachedTool(tool, args.cached_queries)
    return serve(tool, args.host, args.port)


def _served_tool(args: argparse.Namespace) -> Any:
    from hiexp.agent.search_tools import open_index, search_corpus

    dense = _dense_options(args)
    if args.index is not None:
        return open_index(args.index, corpus=args.corpus, kind=args.kind, device=args.device, **dense)
    kind = args.kind or "bm25"
    return search_corpus(args.corpus, kind=kind, cache_dir=args.cache_dir, device=args.device, **dense)


def _dense_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that only dense search has, as they were given; ValueError where they would have no effect."""
    from hiexp.agent.dense_faiss import DEFAULT_EFFORT
    from hiexp.agent.index_folder import read_manifest

    given = {name: getattr(args, name) for name in ("encoder", "method", "effort") if getattr(args, name) is not None}
    kind = args.kind or ("bm25" if args.index is None else read_manifest(args.index)["settings"]["kind"])
    if given and kind != "dense":
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags}: belongs to dense search, but {args.index or args.corpus} is searched by {kind}")
    if args.effort is not None and args.method not in DEFAULT_EFFORT:
        raise ValueError(f"--effort: belongs to --method {' and '.join(DEFAULT_EFFORT)}, got {args.method or 'exact'}")
    return given


def _settings(config: TrainConfig, k: int, shard_questions: int, snapshot: Snapshot | None) -> dict[str, Any]:
    """Everything the rollouts depend on, as it is stored beside them."""
    from hiexp.agent.eval_store import IRRELEVANT

    values = {stage: part for stage, part in config.to_dict().items() if stage not in _UNUSED}
    for stage, key in IRRELEVANT:
        values[stage].pop(key)
    return {
        **values,
        "seed": config.run.seed,
        "k": k,
        "shard_questions": shard_questions,
        "snapshot_id": None if snapshot is None else snapshot.id,
    }


def _shard(out: Path, start: int) -> Path:
    return out / f"shard_{start:06d}.jsonl.gz"


def _shard_rollouts(
    actor: Actor,
    task: Any,
    config: TrainConfig,
    asked: Sequence[tuple[int, Question]],
    k: int,
    snapshot: Snapshot | None,
) -> list[dict[str, Any]]:
    """K scored rollouts of each ``(place, question)``; seeds depend on the place alone, not on the shard."""
    from hiexp.agent.engine import Sampling
    from hiexp.rl.act import rollout_seed
    from hiexp.rl.reward import score_rollouts

    informed = round(config.experience.experience_share * k) if snapshot is not None else 0
    rows = [(place, question, index) for place, question in asked for index in range(k)]
    questions = [question for _, question, _ in rows]
    rollouts = actor.run(
        questions,
        tool=None,
        snapshot=snapshot,
        with_experience=[index < informed for _, _, index in rows],
        indices=[index for _, _, index in rows],
        seeds=[rollout_seed(config.run.seed, 0, place, index) for place, _, index in rows],
        policy_step=0,
        sampling=Sampling(config.rollout.temperature, config.rollout.top_p),
        label="rollouts",
    )
    score_rollouts(rollouts, questions, task, config.task.metric, config.task.malformed_reward)
    return [rollout.to_json() for rollout in rollouts]


def _tokens(rows: Sequence[Mapping[str, Any]], prices: Prices | None) -> str:
    """Tokens of all rollouts; at ``prices`` also their cost on a server without prefix cache, which reads each turn's
    whole conversation again."""
    sampled = sum(sum(row["loss_mask"]) for row in rows)
    inserted = sum(len(row["loss_mask"]) for row in rows) - sampled
    text = f"{sampled:,} tokens sampled, {inserted:,} inserted (prompts, documents, experience)"
    if prices is None:
        return text
    read = sum(span["start"] for row in rows for span in row["spans"] if span["kind"] == "sampled")
    return f"{text}; {read:,} read over all turns, cost at most {prices.of(read, sampled):.4f}"


def _mean_scores(rows: Sequence[Mapping[str, Any]]) -> str:
    from hiexp.rl.metrics import mean

    names = sorted({name for row in rows for name in row["scores"]})
    scores = [f"{name} {number(mean([row['scores'].get(name, 0.0) for row in rows]))}" for name in names]
    return "  ".join([*scores, f"searches {number(mean([len(row['tool_calls']) for row in rows]))}"])
