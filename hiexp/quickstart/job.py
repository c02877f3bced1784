"""The whole quickstart: world -> warm start -> own rollouts -> HEK -> three arms of GRPO -> evaluation -> report.

    OUT/quickstart.yaml   settings            OUT/experience/   own rollouts, hek.sqlite, report.json
    OUT/policy/           warm-started model  OUT/no-hek, hek-all, hek-half/   run directories of the arms
    OUT/report.html, comparison.png, summary.txt

Every stage that is finished is kept, so a killed quickstart continues with the same command. Nothing is precomputed:
the verdict at the end is computed from the numbers of this run, whatever they say.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from hiexp.experience.store import HEK
from hiexp.io import atomic_write
from hiexp.quickstart.config import ARMS, QuickstartConfig
from hiexp.quickstart.source import gather_experience
from hiexp.quickstart.stages import Say, stage
from hiexp.quickstart.summary import summary
from hiexp.quickstart.worlds import MiniWorldTask
from hiexp.report.page import report
from hiexp.report.plots import comparison_png
from hiexp.rl.config import ModelConfig
from hiexp.rl.model import load_policy, quiet_transformers
from hiexp.rl.run_directory import claim, directory_lock
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.warm_start import warm_start


def quickstart(config: QuickstartConfig, out: str | Path, say: Say = print) -> Path:
    """Run, or continue, the quickstart in ``out``; returns the path of the report.

    Raises:
        ValueError: ``out`` holds a quickstart with other settings (they are named), or another process works in it.
    """
    with directory_lock(Path(out)):
        return _quickstart(config, Path(out), say)


def _quickstart(config: QuickstartConfig, out: Path, say: Say) -> Path:
    quiet_transformers()
    if config.train.run.threads is not None:
        torch.set_num_threads(config.train.run.threads)
    begin = time.perf_counter()
    claim(out / "quickstart.yaml", config, "a quickstart")
    task = _task(config)
    stage(out / "policy", lambda folder: _warm_start(config, folder, say), say, "1/4 warm start by imitation")
    stage(
        out / "experience", lambda folder: _gather(config, task, out / "policy", folder, say), say,
        "2/4 own rollouts, distilled into a HEK",
    )  # fmt: skip
    say("3/4 GRPO from the same start: without HEK, with it in every rollout, with it in half of each group")
    for arm in ARMS:
        _train(config, task, arm, out, say)
    runs = [out / arm for arm in ARMS]
    say("4/4 report")
    page = report(runs, out / "report.html")
    comparison_png(runs, out / "comparison.png")
    text = summary(runs, _read(out / "experience" / "report.json"))
    atomic_write(out / "summary.txt", text)
    say(f"\n{text}\nReport: {page}   ({time.perf_counter() - begin:.0f} s)")
    return page


def _task(config: QuickstartConfig) -> MiniWorldTask:
    worlds = config.worlds
    return MiniWorldTask(
        config.seed, worlds.training_size, worlds.evaluation_size, config.train.evaluation.questions
    )  # fmt: skip


def _warm_start(config: QuickstartConfig, folder: Path, say: Say) -> None:
    begin = time.perf_counter()
    policy, tokenizer, losses = warm_start(config.seed, config.warm_start)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - begin
    atomic_write(folder / "warm_start.json", json.dumps({"losses": losses, "seconds": seconds}))
    tail = losses[-20:]
    say(f"    {len(losses)} steps, loss {losses[0]:.2f} -> {sum(tail) / len(tail):.2f}, {seconds:.0f} s")


def _gather(config: QuickstartConfig, task: MiniWorldTask, policy: Path, folder: Path, say: Say) -> None:
    model, tokenizer = load_policy(ModelConfig(path=str(policy), device=config.train.model.device))
    found = gather_experience(config, model, tokenizer, task, folder)
    atomic_write(folder / "report.json", json.dumps(found, indent=1) + "\n")
    sizes = ", ".join(f"{size} {level}" for level, size in found["sizes"].items())
    say(
        f"    {found['attempts']} rollouts, {found['contrastive']} of {found['questions']} questions with right and "
        f"wrong ones; HEK: {sizes}; {sum(found['seconds'].values()):.0f} s"
    )


def _train(config: QuickstartConfig, task: MiniWorldTask, arm: str, out: Path, say: Say) -> None:
    begin = time.perf_counter()
    with HEK.open(out / "experience" / "hek.sqlite") as hek:
        snapshot = hek.snapshot()
    # An arm without HEK still gets the snapshot: it is evaluated with and without it like the others.
    trainer = GRPOTrainer(config.arm(arm, out / arm, out / "policy"), task=task, snapshot=snapshot)
    trainer.train(listener=lambda kind, row: _progress(kind, row, arm, config.train.run.steps, say))
    say(f"    {arm}: {time.perf_counter() - begin:.0f} s")


def _progress(kind: str, row: dict[str, Any], arm: str, steps: int, say: Say) -> None:
    if kind == "step" and (row["step"] % 20 == 0 or row["step"] == steps):
        pace = f"{row['seconds_step']:.1f} s a step"
        say(f"    {arm} step {row['step']}/{steps}: reward {row['reward_mean']:.2f} ({pace})")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
