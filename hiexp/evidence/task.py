"""Miniworlds of the study: families that are trained and families that never are, in wordings old and new."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from hiexp.evidence.config import EvidenceConfig
from hiexp.quickstart.worlds import world_seed
from hiexp.rl.reward import TaskBatch
from hiexp.tasks.miniworld import MiniWorld
from hiexp.tasks.miniworld_text import FAMILIES, PAIRS, PHRASED, REPHRASED, Family, Pair
from hiexp.tasks.question import Question
from hiexp.tasks.scorers import Scorer

Stratum = Literal["seen", "reworded", "unseen"]
STRATA: tuple[Stratum, ...] = ("seen", "reworded", "unseen")


class EvidenceTask:
    """A :class:`hiexp.rl.reward.Task`; everything is a function of ``seed`` and the step."""

    def __init__(self, config: EvidenceConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        unseen = random.Random(f"unseen pairs/{seed}").sample(PAIRS, config.unseen_pairs)
        self.seen_pairs: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in unseen)
        self.seen: tuple[Family, ...] = tuple(one for one in FAMILIES if one.pair not in unseen)
        self.unseen: tuple[Family, ...] = tuple(one for one in FAMILIES if one.pair in unseen)
        self._scorer = Scorer("hiexp")

    def source(self) -> tuple[MiniWorld, list[Question]]:
        """The world and questions that the store is drawn from: families of training, other people and films."""
        world = MiniWorld(world_seed("source", self.seed), self.config.source.world_size)
        return world, world.questions(self.config.source.questions, seed=0, families=self.seen)

    def training(self, step: int, count: int) -> TaskBatch:
        """``count`` questions about the world of ``step``, with its search tool."""
        world = MiniWorld(world_seed("training", self.seed, step), self.config.worlds.training_size)
        return TaskBatch(world.questions(count, seed=step, families=self.seen), world.tool)

    @cached_property
    def test(self) -> Mapping[Stratum, list[Question]]:
        """Test questions by stratum, all about one world."""
        world, config = self._test_world, self.config
        return {
            "seen": world.questions(config.test_seen, 0, self.seen, PHRASED),
            "reworded": world.questions(config.test_reworded, 1, self.seen, REPHRASED),
            "unseen": world.questions(config.test_unseen, 2, self.unseen, PHRASED),
        }

    @cached_property
    def _test_world(self) -> MiniWorld:
        return MiniWorld(world_seed("evaluation", self.seed), self.config.worlds.evaluation_size)

    def evaluation(self) -> Sequence[TaskBatch]:
        """The test questions, stratum by stratum, with the search tool of their world."""
        return [TaskBatch([one for stratum in STRATA for one in self.test[stratum]], self._test_world.tool)]

    def known_questions(self) -> list[Question]:
        """Every question of training and test: their answers must not occur in a lesson."""
        run = self.config.train.run
        batches = [self.training(step, run.questions_per_step) for step in range(1, run.steps + 1)]
        return [question for batch in [*batches, *self.evaluation()] for question in batch.questions]

    def score(self, question: Question, answer: str | None) -> Mapping[str, float]:
        """em, f1 and cem against the solver's answer."""
        return self._scorer.score(answer, question.golden_answers)
