"""Rollouts per minute of vLLM and of the transformers engine: same model, questions, seeds and limits.

Run in the environment of `make vllm-env`: python benchmarks/bench_vllm.py CONFIG [--questions 8] [--group 4]
[--rounds 3]. Each engine runs in a process of its own, because vLLM fixes the threads of its process. A round is all
rollouts of all questions, side by side; round 0 warms up and does not count. A figure is the best round's. "from the
cache" is the share of prompt tokens, over all turns of a round, that vLLM found in its prefix cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

ENGINES = ("transformers", "vllm")


def measure(engine, args):
    """Figures of one engine, in this process."""
    from hiexp.agent.command_config import make_actor
    from hiexp.agent.engine import Sampling
    from hiexp.rl.act import rollout_seed
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.setup import make_task, make_tool

    rows = args.questions * args.group
    config = TrainConfig.from_yaml(
        args.config,
        [f"rollout.engine={engine}", f"rollout.batch_rows={rows}", "rollout.vllm_cache_gib=2", *args.set],
    )
    begin = time.perf_counter()
    actor = make_actor(config, make_tool(config.tool))
    started = time.perf_counter() - begin
    asked = make_task(config.task, config.run.seed).training(1, args.questions).questions
    questions = [question for question in asked for _ in range(args.group)]
    best = None
    for round_ in range(args.rounds + 1):
        if hasattr(actor.engine, "reset_cache"):
            actor.engine.reset_cache()
        before = getattr(actor.engine, "cached_tokens", 0), getattr(actor.engine, "prompt_tokens", 0)
        begin = time.perf_counter()
        rollouts = actor.run(
            questions, tool=None, snapshot=None, with_experience=[False] * rows,
            indices=list(range(args.group)) * args.questions,
            seeds=[rollout_seed(0, 1, i // args.group, i % args.group) for i in range(rows)],
            policy_step=0, sampling=Sampling(config.rollout.temperature, config.rollout.top_p),
            label=f"{engine} {round_}",
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        sampled = sum(sum(one.loss_mask) for one in rollouts)
        figures = {
            "engine": engine, "rollouts per minute": rows / seconds * 60,
            "sampled tokens per second": sampled / seconds, "sampled tokens": sampled,
            "searches": sum(len(one.tool_calls) for one in rollouts), "start s": started,
        }  # fmt: skip
        if engine == "vllm":
            cached, prompt = actor.engine.cached_tokens - before[0], actor.engine.prompt_tokens - before[1]
            figures["from the cache"] = cached / prompt
        if round_ > 0 and (best is None or figures["rollouts per minute"] > best["rollouts per minute"]):
            best = figures
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="STAGE.KEY=VALUE")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine is not None:
        print(json.dumps(measure(args.engine, args)))
        return
    columns = (
        "rollouts per minute",
        "sampled tokens per second",
        "sampled tokens",
        "searches",
        "from the cache",
        "start s",
    )
    print(f"| engine | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for engine in ENGINES:
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--engine", engine], stdout=subprocess.PIPE, text=True, check=True
        )
        figures = json.loads(child.stdout.strip().splitlines()[-1])
        cells = [f"{figures[column]:.2f}" if column in figures else "-" for column in columns]
        print(f"| {engine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
