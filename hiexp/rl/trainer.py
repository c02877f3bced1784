"""GRPO on search rollouts conditioned on experience (paper: stages 4 and 5).

A step: questions -> rollouts from the pinned snapshot -> rewards -> group advantages -> policy update -> metrics.
Everything in step s is a function of (weights, optimiser state, s, seed). So a run that is killed continues from its
last checkpoint and ends with the same weights and metrics as one that was not. Several processes (docs/distributed.md)
share the rollouts and the update of a step; rank 0 writes.

Departures from the paper: part of each group may be controls without experience (``experience.experience_share``); rows
of groups without reward variance leave the update, KL term included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from hiexp.agent.dropout import annealed
from hiexp.agent.engine import Sampling
from hiexp.agent.record import Rollout
from hiexp.rl.act import ActedStep, Actor, rollout_seed
from hiexp.rl.alarms import AlarmError, AlarmLog
from hiexp.rl.batch import trainable
from hiexp.rl.checkpoint import Checkpoints
from hiexp.rl.collect import FAR, collect, round_questions
from hiexp.rl.config import TrainConfig
from hiexp.rl.credit import assign
from hiexp.rl.distributed import Ranks
from hiexp.rl.evaluate import evaluate, evaluation_batches
from hiexp.rl.inputs import fingerprints
from hiexp.rl.memory import peak_memory, return_freed_memory
from hiexp.rl.metrics import MetricsLog, ServiceCounts, reward_metrics, rollout_metrics
from hiexp.rl.model import check_policy, load_policy, packs_prefixes, pad_token_id, prepare, resolve_device
from hiexp.rl.policy import Policy, random_state, set_random_state
from hiexp.rl.preemption import Preempted, Preemption, watched
from hiexp.rl.reward import QuestionTask, Task, TaskBatch, check_rewards, score_rollouts
from hiexp.rl.run_directory import RunDirectory
from hiexp.rl.setup import check_leaks, check_training, choose_snapshot, make_task, make_tool, snapshot_metrics
from hiexp.rl.source import RolloutSource
from hiexp.rl.trackers import Trackers
from hiexp.rl.update import PolicyUpdate
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot

# Called with ("step", metrics row), ("evaluation", evaluation) or ("alarm", {"step", "name", "message"}).
Listener = Callable[[str, dict[str, Any]], None]


class GRPOTrainer:
    """Trains a policy in the run directory ``config.run.dir``; what is not passed is built from the config.

    Args:
        config: all settings.
        model: causal language model of transformers, trained in place; loaded from ``config.model`` if None.
        tokenizer: its tokenizer.
        task: see :class:`hiexp.rl.reward.Task`.
        tool: search tool for batches of the task that bring none.
        snapshot: experience; taken from ``config.experience.hek`` if None.
        allow_changed: settings that may differ from those the run in the directory was started with, and
            ``model.weights``, the contents of the starting model.

    Raises:
        ValueError, TypeError, DataError, OSError: unusable settings, files or model, before anything is written.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        task: Task | None = None,
        tool: Tool | None = None,
        snapshot: Snapshot | None = None,
        allow_changed: Sequence[str] = (),
    ) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("model, tokenizer: expected both or neither")
        check_training(config)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.config = config
        self.directory = RunDirectory(config, allow_changed)
        self.snapshot = choose_snapshot(config.experience, self.directory, snapshot)
        self.task = task if task is not None else make_task(config.task, config.run.seed)
        self.tool = tool if tool is not None else make_tool(config.tool)
        if model is None:
            model, tokenizer = load_policy(config.model)
        else:
            prepare(model)
            check_policy(model, tokenizer)
        self.directory.check_inputs(fingerprints(model, self.task))
        self.tokenizer = tokenizer
        self.checkpoints = Checkpoints(self.directory.path / "checkpoints", config.run.keep_last)
        self._alarms = AlarmLog(self.directory.path, config.alarms)
        self._build(model)
        self._check_questions()

    def _build(self, model: Any) -> None:
        """Optimiser, reference, engine, around the model on its device."""
        config = self.config
        self.accelerator = Accelerator(cpu=resolve_device(config.model.device).type == "cpu")
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.ranks.agree("the config", config)
        self.ranks.agree("the HEK snapshot", None if self.snapshot is None else self.snapshot.id)
        self.policy = Policy(model, config, self.accelerator)
        self.model, self.optimizer = self.policy.model, self.policy.optimizer
        probes = self.task.training(1, config.run.questions_per_step).questions
        self._source = RolloutSource(config, self.policy.acting, self.tokenizer, self.ranks, probes)
        self._actor = Actor(self._source.engine, self.tool, config, self.ranks)
        self._update = PolicyUpdate(
            self.policy.scorer, self.policy.reference, self.optimizer, self.accelerator, config.algorithm,
            pad_id=pad_token_id(self.tokenizer), seed=config.run.seed,
            constant_length=config.rollout.longest, ranks=self.ranks,
            faults=self.directory.path / "faults", kl_in_reward=config.credit.kl_in_reward,
            packed=packs_prefixes(self.policy.acting),
        )  # fmt: skip

    def _check_questions(self) -> None:
        """Neither a question too long for the limits nor a lesson that gives an answer away may show up after hours.

        Of an endless task only step 1 and the evaluation are looked at; its worlds share no facts with lessons.
        """
        known = self.task.questions if isinstance(self.task, QuestionTask) else []
        check_leaks(self.snapshot, known)
        batches = evaluation_batches(self.task, self.config.evaluation.questions)
        batches.append(self.task.training(1, self.config.run.questions_per_step))
        self._actor.check_prompts([question for batch in batches for question in batch.questions] + known)

    def train(self, listener: Listener | None = None) -> dict[str, Any]:
        """Train from the last checkpoint, or from the start, to ``run.steps``; returns the metrics of the last step.

        Raises:
            AlarmError: an alarm of ``alarms.stop`` was raised; the step is finished and checkpointed.
            CheckpointError: a checkpoint could not be written; the run continues from the one before it.
            Preempted: a signal asked to stop; the step it came in is finished and checkpointed.
            RankError: another process of the run failed.
            ValueError: a NaN or infinite reward (``algorithm.nan_reward``), or the directory is in use.
        """
        with ExitStack() as held:
            # Rank 0 holds the lock for all; where it cannot, all learn why.
            self.ranks.on_main(lambda: held.enter_context(self.directory.locked()))
            preemption = held.enter_context(watched())
            start = self._resume()
            held.callback(self._source.close)
            log = self._open_log(start)
            held.callback(log.close)
            self._catch_up(start, log, listener, preemption)
            for step in range(start + 1, self.config.run.steps + 1):
                self._train_step(step, log, listener, preemption)
            return log.rows[-1] if log.rows else {}

    def _catch_up(self, start: int, log: MetricsLog, listener: Listener | None, preemption: Preemption) -> None:
        """The evaluation at ``start`` where it is missing: at the beginning, and where a signal came before it."""
        missing = self.ranks.on_main(lambda: self.checkpoints.score(start)) is None
        if missing and not self.ranks.any(preemption.asked):
            score = self._evaluate_if_due(start, log, listener)
            if start > 0 and score is not None:
                self.ranks.on_main(lambda: self.checkpoints.rate(start, score))
        if self.ranks.any(preemption.asked) and start < self.config.run.steps:
            raise Preempted(start)

    def _train_step(self, step: int, log: MetricsLog, listener: Listener | None, preemption: Preemption) -> None:
        """One step with all that belongs to it: metrics, evaluation, checkpoint, and the end if a signal asked."""
        run = self.config.run
        metrics = self._step(step)
        row = self.ranks.on_main(lambda: log.append(metrics))
        if not self.ranks.main:
            log.rows.append(row)
        elif listener is not None:
            listener("step", row)
        alarms = self.ranks.on_main(lambda: self._alarms.check(log.rows))
        if listener is not None and self.ranks.main:
            for alarm in alarms:
                listener("alarm", asdict(alarm))
        stopping = self._alarms.stopping(alarms)
        preempted = skipped = self.ranks.any(preemption.asked)
        # There may be seconds left: the evaluation is a function of the weights and can be made when the run goes on.
        score = None if skipped else self._evaluate_if_due(step, log, listener)
        preempted = preempted or self.ranks.any(preemption.asked)
        last = step == run.steps
        if step % run.checkpoint_every == 0 or last or preempted or stopping or self._improved(step, score):
            self._save(step, score)
        if stopping:
            raise AlarmError(stopping)
        if preempted and (not last or (skipped and self._evaluation_due(step))):
            raise Preempted(step)

    def _improved(self, step: int, score: float | None) -> bool:
        """Whether ``score`` is above those of all checkpoints before ``step``."""
        before = None if score is None else self.ranks.on_main(lambda: self.checkpoints.best_score(step))
        return score is not None and (before is None or score > before)

    def _open_log(self, start: int) -> MetricsLog:
        """The metrics of the run up to step ``start``; rank 0 writes, and opens the trackers."""
        run, path = self.config.run, self.directory.path
        if self.ranks.main:
            config = self.config.to_dict()
            log = MetricsLog(path, resume_step=start, trackers=Trackers(run.trackers, path, config, start))
            self._alarms.rewind(start)
        else:
            log = MetricsLog(path, resume_step=start, writes=False)
        self.ranks.barrier()
        return log

    def _step(self, step: int) -> dict[str, Any]:
        """One training step; returns its metrics."""
        begin, counts = time.perf_counter(), ServiceCounts(self.tool, self.task)
        acted = self._act(step)
        return_freed_memory()
        learning = time.perf_counter()
        metrics = self._learn(acted, step)
        return_freed_memory()
        self._source.updated(step)
        end = time.perf_counter()
        seen = acted if acted.sampled is None else acted.sampled
        # Rollouts of later steps are made meanwhile: what the tool counts belongs to no step.
        unknown = dict.fromkeys(("tool_retries", "empty_passages")) if self.config.rollout.staleness > 0 else {}
        return {
            "step": step, **reward_metrics(seen.rewards, seen.groups, seen.with_experience), **metrics,
            **rollout_metrics(seen.rollouts, seen.with_experience), **snapshot_metrics(self.snapshot),
            **counts.read(), **unknown, **acted.metrics, "staleness": acted.staleness,
            **peak_memory(self.accelerator.device),
            **acted.seconds, **self._update.clock.take(), "seconds_update": end - learning, "seconds_step": end - begin,
        }  # fmt: skip

    def _act(self, step: int) -> ActedStep:
        """The rollouts of ``step``, judged and written to the run directory."""
        acted = collect(partial(self._act_round, step), self.config.run.questions_per_step, self.config.credit)
        self._source.rest()
        everything = acted if acted.sampled is None else acted.sampled
        self.ranks.on_main(lambda: self.directory.write_rollouts(step, everything.rollouts))
        check_rewards(everything.rewards, everything.rollouts, self.config.algorithm.nan_reward)
        return acted

    def _act_round(self, step: int, number: int, wanted: int, asked: set[str]) -> ActedStep | None:
        """Judged rollouts of ``wanted`` questions of round ``number`` (from 0) of ``step``; none of those ``asked``."""
        begin = time.perf_counter()
        config, size = self.config, self.config.rollout.group_size
        batch = round_questions(self.task, step, number, wanted, asked)
        if batch is None:
            return None
        clock = self._source.clock
        clock.take()  # what an evaluation took is no part of the step
        if number == 0:
            rollouts, engine = self._source.rollouts(step)
        else:
            rollouts = self._source.run(lambda: self._ask(batch, step, number, step - 1))
            engine = {"staleness": 0}
        acted = time.perf_counter()
        questions = [question for question in batch.questions for _ in range(size)]
        rewards = score_rollouts(rollouts, questions, self.task, config.task.metric, config.task.malformed_reward)
        seconds = {"seconds_rollout": acted - begin, "seconds_score": time.perf_counter() - acted, **clock.take()}
        count = len(batch.questions)
        return ActedStep(
            questions, rollouts, rewards, np.repeat(np.arange(count), size), self._informed(count), seconds,
            staleness=engine.pop("staleness"), metrics=engine,
        )  # fmt: skip

    def _sample(self, step: int, policy_step: int) -> list[Rollout]:
        """Rollouts on the questions of ``step`` with the weights that the engine has, those after ``policy_step``."""
        batch = round_questions(self.task, step, 0, self.config.run.questions_per_step, set())
        return [] if batch is None else self._ask(batch, step, 0, policy_step)

    def _ask(self, batch: TaskBatch, step: int, number: int, policy_step: int) -> list[Rollout]:
        """Rollouts of the groups of ``batch``, the questions of round ``number`` of ``step``."""
        config, experience, size = self.config, self.config.experience, self.config.rollout.group_size
        count, place = len(batch.questions), step + number * FAR
        return self._actor.run(
            [question for question in batch.questions for _ in range(size)],
            tool=batch.tool,
            snapshot=self.snapshot,
            with_experience=self._informed(count),
            indices=list(range(size)) * count,
            seeds=[rollout_seed(config.run.seed, place, group, i) for group in range(count) for i in range(size)],
            policy_step=policy_step,
            sampling=Sampling(config.rollout.temperature, config.rollout.top_p),
            label=f"step {step} of {config.run.steps}: rollouts",
            dropout=annealed(experience.dropout, experience.dropout_final, experience.dropout_steps, step),
        )

    def _informed(self, questions: int) -> list[bool]:
        """Which rows of a step with so many questions may see experience."""
        size = self.config.rollout.group_size
        # Rollouts of a group differ by nothing but their seed, so taking the first ones is taking random ones.
        informed = round(self.config.experience.experience_share * size) if self.snapshot is not None else 0
        return [index < informed for index in range(size)] * questions

    def _learn(self, acted: ActedStep, step: int) -> dict[str, Any]:
        """Advantages and update; zero-variance groups, NaN rewards and rollouts without sampled tokens stay out."""
        config, rollouts = self.config, acted.rollouts
        self.model.train(config.model.gradient_checkpointing or config.model.lora_dropout > 0)
        try:
            scores = penalty = None
            if config.credit.kl_in_reward:
                whole = [i for i, rollout in enumerate(rollouts) if trainable(rollout)]
                scores = self._update.score(rollouts, whole, step, acted.staleness, whole=True)
                penalty = self._update.kl_penalty(scores, len(rollouts))
            credit = assign(
                rollouts, acted.rewards, acted.groups, config.algorithm, config.credit, kl_penalty=penalty,
                longest=config.rollout.longest,
            )  # fmt: skip
            metrics = self._update.run(
                rollouts, credit.advantages, credit.trained, step,
                rewards=acted.rewards, scores=scores, staleness=acted.staleness,
            )  # fmt: skip
            if not credit.trained:
                seen = acted if acted.sampled is None else acted.sampled
                metrics |= self._update.observe(seen.rollouts, step)
        finally:
            self.model.eval()
            self.policy.refresh()
        return {**credit.metrics, **metrics}

    def evaluate(self, step: int = 0) -> dict[str, Any]:
        """``{"step", "without_hek", "with_hek"}`` of the current weights over the evaluation questions."""
        settings = self.config.evaluation

        def act(questions: Sequence[Question], tool: Any, snapshot: Any) -> list[Rollout]:
            return self._actor.answer(questions, tool, snapshot, policy_step=step)

        result = self._source.run(
            lambda: evaluate(
                act, self.task, evaluation_batches(self.task, settings.questions),
                self.snapshot if settings.with_hek else None,
                metric=self.config.task.metric, malformed_reward=self.config.task.malformed_reward,
            )
        )  # fmt: skip
        return {"step": step, **result}

    def _evaluate_if_due(self, step: int, log: MetricsLog, listener: Listener | None) -> float | None:
        """Evaluate where the config asks for it; returns the score that decides which checkpoint is the best."""
        if not self._evaluation_due(step):
            return None
        known = self.ranks.on_main(lambda: self.directory.read_evaluation(step))
        result = self.evaluate(step) if known is None else known
        if known is None:
            self.ranks.on_main(lambda: self.directory.write_evaluation(step, result))
        for arm in ("without_hek", "with_hek"):
            log.publish(f"eval_{arm}", result[arm] or {}, step)
        if listener is not None and self.ranks.main:
            listener("evaluation", result)
        # The arm that the run trains decides.
        informed = result["with_hek"] is not None and self.config.experience.experience_share > 0
        return float(result["with_hek" if informed else "without_hek"]["reward"])

    def _evaluation_due(self, step: int) -> bool:
        every, last = self.config.evaluation.every, self.config.run.steps
        due = step in (0, last) or (every > 0 and step % every == 0)
        return due and bool(evaluation_batches(self.task, self.config.evaluation.questions))

    def _save(self, step: int, score: float | None) -> None:
        """A checkpoint of everything that the next step depends on."""
        weights = self.policy.state()
        generators = self.ranks.gather(random_state())
        # Questions and sampling seeds of a step are functions of run.seed and the step; these name the place.
        state = {
            "step": step, "seed": self.config.run.seed, "snapshot_id": self._snapshot_id,
            "processes": self.ranks.size, "update": self._update.state_dict(),
        }  # fmt: skip

        def write(folder: Path) -> None:
            self.policy.write(weights, folder)
            self._source.write(step, folder)
            self.tokenizer.save_pretrained(folder / "model")
            torch.save(generators, folder / "random.pt")
            (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

        self.ranks.on_main(lambda: self.checkpoints.save(step, write, score))

    @property
    def _snapshot_id(self) -> str | None:
        return None if self.snapshot is None else self.snapshot.id

    def _resume(self) -> int:
        """Load the last whole checkpoint and forget what came after it; returns its step, 0 for a fresh start."""
        found = self.ranks.on_main(self.checkpoints.latest)
        step = 0 if found is None else found[0]
        if found is None:
            # What draws from torch's own generators (dropout of an adapter) depends on the run's seed alone.
            torch.manual_seed(rollout_seed(self.config.run.seed, 0, self.ranks.rank, 0))
        else:
            self._load(found[1])
        self.ranks.on_main(lambda: self._settle(step))
        self._source.begin(step, self._sample, None if found is None else found[1])
        return step

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["snapshot_id"] != self._snapshot_id:
            raise ValueError(
                f"{folder}: the run was trained with HEK snapshot {state['snapshot_id']}, got {self._snapshot_id}; its "
                f"file in {self.directory.path / 'snapshot'} is missing or another one: put it back"
            )
        self.policy.load(folder)
        self._update.load_state_dict(state["update"])
        generators = torch.load(folder / "random.pt", weights_only=True)
        # With more processes than before, the new ones keep the states they started with.
        if self.ranks.rank < len(generators):
            set_random_state(generators[self.ranks.rank])

    def _settle(self, step: int) -> None:
        """The run directory as it was after ``step``, and what a first start puts there."""
        self.directory.rewind(step)
        self.checkpoints.sweep()
        if self.snapshot is not None:
            self.directory.pin_snapshot(self.snapshot)
        self.tokenizer.save_pretrained(self.directory.path / "tokenizer")
