"""One seed of the study: warm start, own experience, teacher, arms, tests; every stage is made once.

SEED/policy/                  warm-started model
SEED/hek/, SEED/teacher/      rollouts, hek.sqlite and report.json of the policy's own HEK and of the teacher's
SEED/arms/ARM/                run directories
SEED/tests/ARM/CONDITION/     rollouts.jsonl.gz, measures.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from hiexp.evidence import stores
from hiexp.evidence.config import ARMS, UNTRAINED, Arm, EvidenceConfig, Store
from hiexp.evidence.task import STRATA, EvidenceTask
from hiexp.evidence.trial import Policy, run_trial
from hiexp.experience.guard import leaking_entries
from hiexp.experience.retrieve import Snapshot
from hiexp.experience.store import HEK
from hiexp.io import atomic_write, write_jsonl
from hiexp.quickstart.config import QuickstartConfig
from hiexp.quickstart.measures import lesson_precision, retrieval_at_search, retrieval_at_start
from hiexp.quickstart.source import contrast, own_rollouts
from hiexp.quickstart.stages import Say, stage
from hiexp.rl.config import ModelConfig
from hiexp.rl.model import load_policy
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.warm_start import warm_start
from hiexp.tasks.question import Question

# Policies that are tested with the teacher's HEK as well as with their own.
_MEETS_TEACHER = (UNTRAINED, "none", "all", "half", "teacher")


class Study:
    """One seed, in ``folder``; :meth:`run` does what is not done yet."""

    def __init__(self, config: EvidenceConfig, seed: int, folder: Path, arms: Sequence[str], say: Say) -> None:
        self.config, self.seed, self.folder, self.arms = config, seed, folder, arms
        self.say: Say = lambda line: say(f"[seed {seed}] {line}")
        self.task = EvidenceTask(config, seed)

    def run(self) -> None:
        """Every stage in order; the teacher's HEK as soon as there is a teacher."""
        for name in ("arms", "tests"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        stage(self.folder / "policy", self._warm_start, self.say, "warm start by imitation")
        stage(self.folder / "hek", self._own_experience, self.say, "own rollouts, distilled into a HEK")
        for name in self.arms:
            if name == "teacher":
                continue
            self._train(name)
            if name == "oracle":
                stage(
                    self.folder / "teacher", self._teach, self.say, "rollouts of the oracle-trained policy, distilled"
                )
                self._test(UNTRAINED)
            self._test(name)
        if "oracle" not in self.arms:
            self._test(UNTRAINED)
        if "teacher" in self.arms:
            self._train("teacher")
            self._test("teacher")

    # Experience

    def _warm_start(self, folder: Path) -> None:
        begin = time.perf_counter()
        policy, tokenizer, losses = warm_start(self.seed, self.config.warm_start, self.config.mix())
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        seconds = time.perf_counter() - begin
        atomic_write(folder / "warm_start.json", json.dumps({"losses": losses, "seconds": seconds}))
        tail = losses[-20:]
        self.say(f"    {len(losses)} steps, loss {losses[0]:.2f} -> {sum(tail) / len(tail):.2f}, {seconds:.0f} s")

    def _own_experience(self, folder: Path) -> None:
        self._gather(folder, self.folder / "policy", None)

    def _teach(self, folder: Path) -> None:
        # Told half of the time: where the others of its group fail, the contrast says why.
        self._gather(folder, self._final("oracle"), stores.oracle())

    def _gather(self, folder: Path, policy: Path, told: Snapshot | None) -> None:
        """Distil the rollouts of ``policy`` about the source questions into ``hek.sqlite`` and judge the lessons."""
        begin = time.perf_counter()
        model, tokenizer = self._load(policy)
        world, questions = self.task.source()
        rollouts = own_rollouts(self._quickstart(), model, tokenizer, world, questions, self.task, told)
        write_jsonl(folder / "rollouts.jsonl.gz", [rollout.to_json() for rollout in rollouts])
        found = contrast(rollouts, questions, self.config.source.group_size)
        known = self.task.known_questions()
        with HEK.create(folder / "hek.sqlite") as hek:
            # The guard knows the answers of all questions there are before the first lesson is written.
            hek.register_questions([*questions, *known])
            hek.add(found.experiences)
            sizes = dict(hek.build_hierarchy().sizes)
            report = {
                "rollouts": found.trajectories, "questions": found.groups, "contrastive": found.contrastive,
                "all_right": found.all_right, "all_wrong": found.all_wrong, "lessons": len(found.experiences),
                "sizes": sizes, "quarantined": len(hek.quarantined()),
                "leaking_entries": len(leaking_entries(hek.snapshot(), [*questions, *known])),
                **self._judge(hek, questions), "seconds": time.perf_counter() - begin,
            }  # fmt: skip
        atomic_write(folder / "report.json", json.dumps(report, indent=1) + "\n")
        self.say(
            f"    {report['contrastive']} of {report['questions']} questions with right and wrong rollouts; HEK "
            f"{', '.join(f'{n} {level}' for level, n in sizes.items())}; {report['seconds']:.0f} s"
        )

    def _judge(self, hek: HEK, questions: Sequence[Question]) -> dict[str, Any]:
        """Against the latent lessons: are those extracted true, and does similarity bring the right one?"""
        sources, snapshot, settings = {one.id: one for one in questions}, hek.snapshot(), self.config.train.experience
        return {
            "precision": {level: lesson_precision(hek.entries(level), sources) for level in ("E1", "E2", "E3")},
            "retrieval_start": {
                stratum: retrieval_at_start(
                    snapshot, self.task.test[stratum], settings.start_levels, settings.start_top_k
                )
                for stratum in STRATA
            },
            # A search for the trap: the moment at which the lesson is needed.
            "retrieval_search": {
                stratum: retrieval_at_search(snapshot, self.task.test[stratum], _trap_query, settings.e1_threshold)
                for stratum in STRATA
            },
        }

    @cached_property
    def _hek(self) -> Snapshot:
        return _snapshot(self.folder / "hek")

    def _store(self, store: Store) -> Snapshot:
        if store == "teacher":
            return _snapshot(self.folder / "teacher")
        if store == "placebo":
            return stores.placebo(self._hek, self.task.seen_pairs, self.seed)
        if store == "shuffled":
            return stores.shuffled(self._hek, self.seed)
        return {"hek": lambda: self._hek, "oracle": stores.oracle, "plain": stores.plain}[store]()

    # Arms

    def _train(self, name: str) -> None:
        config = self.config.arm(name, self.seed, self.folder / "arms" / name, self.folder / "policy")
        if self._final(name).is_dir():
            self.say(f"{name}: trained before")
            return
        begin, rewards = time.perf_counter(), []

        def listen(kind: str, row: dict[str, Any]) -> None:
            rewards.append(row["reward_mean"])
            if row["step"] % 20 == 0:
                self.say(f"    {name} step {row['step']}/{config.run.steps}: reward {mean(rewards[-5:]):.2f}")

        GRPOTrainer(config, task=self.task, snapshot=self._store(ARMS[name].store)).train(listener=listen)
        self.say(f"{name}: {config.run.steps} steps, {time.perf_counter() - begin:.0f} s")

    def _final(self, name: str) -> Path:
        """The trained model of an arm; there once its last step is on the disk."""
        return self.folder / "arms" / name / "checkpoints" / f"step_{self.config.arm_steps(name):06d}" / "model"

    # Tests

    def _test(self, name: str) -> None:
        folder = self.folder / "tests" / name
        folder.mkdir(exist_ok=True)
        due = {one: arm for one, arm in self._conditions(name).items() if not (folder / one).is_dir()}
        if not due:
            return
        start, tokenizer = self._load(self.folder / "policy")
        model = start if name == UNTRAINED else self._load(self._final(name))[0]
        policy = Policy(model, tokenizer, start)
        quiet: Say = lambda line: None  # noqa: E731
        for condition, arm in due.items():
            stage(folder / condition, lambda at, arm=arm: self._trial(policy, arm, at), quiet, condition)  # type: ignore[misc]
        self.say(f"{name}: test EM of trained families {self._scores(folder)}")

    def _trial(self, policy: Policy, arm: Arm | None, folder: Path) -> None:
        train = self.config.train
        config = replace(
            train,
            experience=train.experience if arm is None else arm.experience(train.experience),
            run=replace(train.run, seed=self.seed),
        )
        run_trial(policy, self.task, config, None if arm is None else self._store(arm.store), folder)

    def _conditions(self, name: str) -> dict[str, Arm | None]:
        """What a policy is tested with: nothing, the HEK in full, the teacher's HEK, and what it was trained with."""
        found: dict[str, Arm | None] = {"without": None, "hek": ARMS["all"]}
        if name in _MEETS_TEACHER and (self.folder / "teacher").is_dir():
            found["teacher"] = ARMS["teacher"]
        if name == UNTRAINED:
            return found | {one: ARMS[one] for one in ("oracle", "e1", "e23", "placebo", "shuffled", "plain")}
        return found | ({name: ARMS[name]} if ARMS[name].condition(name) == name != "teacher" else {})

    def _scores(self, folder: Path) -> str:
        read = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*/measures.json"))}
        return ", ".join(f"{condition} {found['seen']['em']:.2f}" for condition, found in read.items())

    def _load(self, path: Path) -> tuple[Any, Any]:
        return load_policy(ModelConfig(path=str(path), device=self.config.train.model.device))

    def _quickstart(self) -> QuickstartConfig:
        config = self.config
        return QuickstartConfig(self.seed, config.warm_start, config.source, config.worlds, config.train)


def _snapshot(folder: Path) -> Snapshot:
    with HEK.open(folder / "hek.sqlite") as hek:
        return hek.snapshot()


def _trap_query(question: Question) -> str:
    return f"{question.meta['entity']} {question.meta['phrase']} {question.meta['trap']}"
