"""One test: a policy answers the test questions under one condition, and what it did with what it was shown is counted.

Conditions of one seed share questions and sampling seeds, so that policies are compared on equal terms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.agent.record import Rollout
from hiexp.evidence.task import STRATA, EvidenceTask
from hiexp.experience.retrieve import Snapshot
from hiexp.io import atomic_write, write_jsonl
from hiexp.quickstart.measures import verdict
from hiexp.rl.act import Actor
from hiexp.rl.batch import microbatches, packed_engine_logprobs, trainable
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import mean
from hiexp.rl.model import pad_token_id
from hiexp.rl.reward import score_rollouts
from hiexp.rl.scorer import PolicyScorer
from hiexp.rl.setup import NoSearch
from hiexp.tasks.question import Question


class Policy:
    """A policy that can be tested, beside the ``start`` it was trained from."""

    def __init__(self, model: Any, tokenizer: Any, start: Any) -> None:
        self.model, self.tokenizer, self.start = model, tokenizer, start


def run_trial(policy: Policy, task: EvidenceTask, config: TrainConfig, snapshot: Snapshot | None, folder: Path) -> None:
    """Write ``rollouts.jsonl.gz`` and ``measures.json`` of the test with ``snapshot``, served as ``config`` says."""
    begin = time.perf_counter()
    # A test asks every question once.
    config = replace(config, evaluation=replace(config.evaluation, temperature=1.0))
    actor = Actor(TransformersEngine(policy.model, policy.tokenizer), NoSearch(), config)
    (batch,) = task.evaluation()
    rollouts = actor.answer(batch.questions, batch.tool, snapshot, policy_step=config.run.steps)
    score_rollouts(rollouts, batch.questions, task, config.task.metric, config.task.malformed_reward)
    found = measure(rollouts, task, snapshot)
    found["kl"] = kl_to_start(policy, rollouts, config)
    found["seconds"] = time.perf_counter() - begin
    write_jsonl(folder / "rollouts.jsonl.gz", [rollout.to_json() for rollout in rollouts])
    atomic_write(folder / "measures.json", json.dumps(found, indent=1) + "\n")


def measure(rollouts: Sequence[Rollout], task: EvidenceTask, snapshot: Snapshot | None) -> dict[str, Any]:
    """Scores by stratum, and over all questions what was served, what was followed and what leaked."""
    descriptions = {} if snapshot is None else {entry.exp_id: entry.description for entry in snapshot.entries}
    answered = {rollout.question_id: rollout for rollout in rollouts}
    found: dict[str, Any] = {}
    for stratum in STRATA:
        pairs = [(question, answered[question.id]) for question in task.test[stratum]]
        readings = [read(question, rollout, descriptions) for question, rollout in pairs]
        found[stratum] = {**_scores([rollout for _, rollout in pairs]), **_uptake(readings)}
    return found


def read(question: Question, rollout: Rollout, descriptions: Mapping[str, str]) -> dict[str, Any]:
    """What one rollout was told about its question and what it chose.

    ``start``, ``tool``: verdict of the first line about the question's attributes in the prompt and of the last one in
    a tool response (``none`` where no line is about them). ``chosen``: the attribute named last, as ``right``,
    ``inverted`` (the trap) or ``other``; ``searched``: the one named first. ``leak``: a line holds the answer.
    """
    lines = [(entry.turn, descriptions[entry.exp_id]) for entry in rollout.injections]
    start = [verdict(line, question) for turn, line in lines if turn == 0]
    tool = [verdict(line, question) for turn, line in lines if turn > 0]
    named = [text for kind, text in rollout.steps if kind == "think"]
    names = {question.meta["right"]: "right", question.meta["trap"]: "inverted"}
    words = [set(line.split()) for _, line in lines]
    return {
        "start": next((one for one in start if one != "other"), "none"),
        "tool": next((one for one in reversed(tool) if one != "other"), "none"),
        "start_lines": len(start), "tool_lines": len(tool),
        "searched": names.get(named[0], "other") if named else "other",
        "chosen": names.get(named[-1], "other") if named else "other",
        "leak": any(answer in line for answer in question.golden_answers for line in words),
    }  # fmt: skip


def _scores(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    queries = [[call.query for call in rollout.tool_calls] for rollout in rollouts]
    return {
        **{name: mean([rollout.scores.get(name, 0.0) for rollout in rollouts]) for name in ("em", "f1", "cem")},
        "answered": mean([rollout.finish_reason == "answer" for rollout in rollouts]),
        "searches": mean([len(asked) for asked in queries]),
        "duplicate_queries": mean([len(asked) - len(set(asked)) for asked in queries]),
        "n": len(rollouts),
    }


def _uptake(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of rollouts by what was served, and of those served a line how many followed it."""
    found: dict[str, Any] = {}
    for place, choice in (("start", "searched"), ("tool", "chosen")):
        told = {one: [r for r in readings if r[place] == one] for one in ("right", "inverted", "none")}
        found[place] = {
            **{one: mean([r[place] == one for r in readings]) for one in told},
            "lines": mean([r[f"{place}_lines"] for r in readings]),
            # None where no rollout was told so.
            "follows_right": mean([r[choice] == "right" for r in told["right"]]),
            "follows_inverted": mean([r[choice] == "inverted" for r in told["inverted"]]),
            "right_untold": mean([r[choice] == "right" for r in told["none"]]),
        }
    found["chose_right"] = mean([r["chosen"] == "right" for r in readings])
    found["leaks"] = sum(r["leak"] for r in readings)
    return found


@torch.no_grad()
def kl_to_start(policy: Policy, rollouts: Sequence[Rollout], config: TrainConfig) -> float:
    """Monte Carlo estimate of KL(policy || warm start) per sampled token, in nats, on the policy's own rollouts."""
    spoken = [i for i, rollout in enumerate(rollouts) if trainable(rollout)]
    scorer = PolicyScorer(policy.start, config.evaluation.temperature)
    total, tokens = 0.0, 0
    budget, pad = config.algorithm.tokens_per_microbatch, pad_token_id(policy.tokenizer)
    for batch in microbatches(rollouts, spoken, budget, pad):
        gap = packed_engine_logprobs(rollouts, batch) - scorer(batch).logprobs
        total, tokens = total + float(gap.sum()), tokens + len(gap)
    return total / tokens if tokens else 0.0
