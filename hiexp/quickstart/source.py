"""From the policy's own rollouts to its experience: act, judge, contrast, cluster, measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiexp.agent.engine import Sampling
from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.agent.record import Rollout
from hiexp.agent.rollout import to_trajectory
from hiexp.experience.distill import DistillReport, distill
from hiexp.experience.reflect_extractive import ExtractiveReflector
from hiexp.experience.retrieve import Snapshot
from hiexp.experience.store import HEK
from hiexp.io import write_jsonl
from hiexp.quickstart.config import QuickstartConfig
from hiexp.quickstart.measures import lesson_precision, retrieval_at_search, retrieval_at_start
from hiexp.quickstart.worlds import MiniWorldTask, world_seed
from hiexp.rl.act import Actor, rollout_seed
from hiexp.rl.reward import Task, score_rollouts
from hiexp.tasks.miniworld import MiniWorld
from hiexp.tasks.question import Question


def gather_experience(
    config: QuickstartConfig, model: Any, tokenizer: Any, task: MiniWorldTask, folder: Path
) -> dict[str, Any]:
    """Write ``rollouts.jsonl.gz`` and ``hek.sqlite`` into ``folder``; return counts, measures and seconds."""
    begin = time.perf_counter()
    world = MiniWorld(world_seed("source", config.seed), config.source.world_size)
    questions = world.questions(config.source.questions, seed=0)
    rollouts = own_rollouts(config, model, tokenizer, world, questions, task)
    write_jsonl(folder / "rollouts.jsonl.gz", [rollout.to_json() for rollout in rollouts])
    acted = time.perf_counter()
    with HEK.create(folder / "hek.sqlite") as hek:
        # The guard knows the answers of all questions there are before the first lesson is written.
        hek.register_questions([*questions, *known_questions(config, task)])
        found = contrast(rollouts, questions, config.source.group_size)
        hek.add(found.experiences)
        distilled = time.perf_counter()
        hierarchy = hek.build_hierarchy()
        built = time.perf_counter()
        measured = measure(config, hek, questions, task)
        quarantined = len(hek.quarantined())
    return {
        "attempts": found.trajectories, "questions": found.groups, "contrastive": found.contrastive,
        "all_right": found.all_right, "all_wrong": found.all_wrong, "lessons": len(found.experiences),
        "sizes": dict(hierarchy.sizes), "quarantined": quarantined, **measured,
        "seconds": {"rollouts": acted - begin, "distill": distilled - acted, "build": built - distilled},
    }  # fmt: skip


def own_rollouts(
    config: QuickstartConfig,
    model: Any,
    tokenizer: Any,
    world: MiniWorld,
    questions: Sequence[Question],
    task: Task,
    snapshot: Snapshot | None = None,
) -> list[Rollout]:
    """``source.group_size`` judged rollouts of each question, group by group; half of each are shown ``snapshot``."""
    size, train = config.source.group_size, config.train
    rows = [question for question in questions for _ in range(size)]
    actor = Actor(TransformersEngine(model, tokenizer), world.tool, train)
    rollouts = actor.run(
        rows,
        tool=None,
        snapshot=snapshot,
        with_experience=[snapshot is not None and i % size < size // 2 for i in range(len(rows))],
        indices=[i % size for i in range(len(rows))],
        seeds=[rollout_seed(config.seed, 0, i // size, i % size) for i in range(len(rows))],
        policy_step=0,
        sampling=Sampling(train.rollout.temperature, train.rollout.top_p),
        label="own rollouts",
    )
    score_rollouts(rollouts, rows, task, train.task.metric, train.task.malformed_reward)
    return rollouts


def contrast(rollouts: Sequence[Rollout], questions: Sequence[Question], group_size: int) -> DistillReport:
    """Lessons from right against wrong rollouts of each question."""
    groups = [
        [
            to_trajectory(rollout, question, correct=rollout.scores["em"] == 1.0)
            for rollout in rollouts[first : first + group_size]
        ]
        for question, first in zip(questions, range(0, len(rollouts), group_size), strict=True)
    ]
    return distill(groups, ExtractiveReflector())


def known_questions(config: QuickstartConfig, task: MiniWorldTask) -> list[Question]:
    """Every question of training and evaluation: their answers must not occur in a lesson."""
    run = config.train.run
    batches = [task.training(step, run.questions_per_step) for step in range(1, run.steps + 1)]
    return [question for batch in [*batches, *task.evaluation()] for question in batch.questions]


def measure(config: QuickstartConfig, hek: HEK, questions: Sequence[Question], task: MiniWorldTask) -> dict[str, Any]:
    """Precision of the lessons of each level, and what the evaluation questions would retrieve."""
    sources = {question.id: question for question in questions}
    asked = [question for batch in task.evaluation() for question in batch.questions]
    snapshot, experience = hek.snapshot(), config.train.experience

    def search(question: Question) -> str:
        return f"{question.meta['entity']} {question.meta['phrase']} {question.meta['trap']}"

    return {
        "precision": {level: lesson_precision(hek.entries(level), sources) for level in ("E1", "E2", "E3")},
        "retrieval_start": retrieval_at_start(snapshot, asked, experience.start_levels, experience.start_top_k),
        # A search for the trap: the moment at which the lesson is needed.
        "retrieval_search": retrieval_at_search(snapshot, asked, search, experience.e1_threshold),
    }
