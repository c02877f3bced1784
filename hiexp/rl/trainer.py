"""GRPO on search rollouts conditioned on experience (paper: stages 4 and 5).

A step: questions -> rollouts from the pinned snapshot -> rewards -> group advantages -> policy update -> metrics.
Everything in step s is a function of (weights, optimiser state, s, seed); no random state is carried along. So a run
that is killed continues from its last checkpoint and ends with the same weights and metrics as one that was not.

Departures from the paper: part of each group may be controls without experience (``experience.experience_share``); rows
of groups without reward variance leave the update, KL term included.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from hiexp.agent.engine import Sampling
from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.agent.record import Rollout
from hiexp.ops.group_advantage import group_advantage
from hiexp.rl.act import ActedStep, Actor, rollout_seed
from hiexp.rl.batch import trainable
from hiexp.rl.checkpoint import Checkpoints
from hiexp.rl.config import TrainConfig
from hiexp.rl.evaluate import evaluate, evaluation_batches
from hiexp.rl.metrics import MetricsLog, reward_metrics, rollout_metrics
from hiexp.rl.model import check_policy, load_policy, pad_token_id, prepare, resolve_device
from hiexp.rl.reward import QuestionTask, Task, check_rewards, score_rollouts
from hiexp.rl.run_directory import RunDirectory
from hiexp.rl.setup import check_leaks, choose_snapshot, make_task, make_tool, snapshot_metrics
from hiexp.rl.update import PolicyScorer, PolicyUpdate
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot

# Called with ("step", metrics row) or ("evaluation", evaluation).
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
    ) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("model, tokenizer: expected both or neither")
        if config.rollout.server:
            raise ValueError("rollout.server: expected an empty string in training: new weights do not reach a server")
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.config = config
        self.directory = RunDirectory(config)
        self.snapshot = choose_snapshot(config.experience, self.directory, snapshot)
        self.task = task if task is not None else make_task(config.task, config.run.seed)
        self.tool = tool if tool is not None else make_tool(config.tool)
        if model is None:
            model, tokenizer = load_policy(config.model)
        else:
            prepare(model)
            check_policy(model, tokenizer)
        self.tokenizer = tokenizer
        self.checkpoints = Checkpoints(self.directory.path / "checkpoints", config.run.keep_last)
        self._build(model)
        self._check_questions()

    def _build(self, model: Any) -> None:
        """Optimiser, reference, engine, around the model on its device."""
        config = self.config
        self.accelerator = Accelerator(cpu=resolve_device(config.model.device).type == "cpu")
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"expected one process, got {self.accelerator.num_processes}: start hiexp without a launcher"
            )
        reference = None
        if config.algorithm.kl_coef > 0:
            frozen = copy.deepcopy(model).requires_grad_(False).to(self.accelerator.device)
            reference = PolicyScorer(frozen, config.rollout.temperature)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.algorithm.lr,
            betas=config.algorithm.betas,
            weight_decay=config.algorithm.weight_decay,
        )
        scorer, self.optimizer = self.accelerator.prepare(PolicyScorer(model, config.rollout.temperature), optimizer)
        self.model = self.accelerator.unwrap_model(scorer).model
        engine = TransformersEngine(
            self.model, self.tokenizer, device=self.accelerator.device, context_length=config.model.context_length
        )
        self._actor = Actor(engine, self.tool, config)
        self._update = PolicyUpdate(
            scorer, reference, self.optimizer, self.accelerator, config.algorithm,
            pad_id=pad_token_id(self.tokenizer), seed=config.run.seed,
            constant_length=config.rollout.max_turns * config.rollout.max_new_tokens,
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
            CheckpointError: a checkpoint could not be written; the run continues from the one before it.
            ValueError: a NaN or infinite reward (``algorithm.nan_reward``), or the directory is in use.
        """
        run = self.config.run
        with self.directory.locked():
            start = self._resume()
            log = MetricsLog(self.directory.path, resume_step=start, tensorboard=run.tensorboard)
            try:
                if start == 0:
                    self._evaluate_if_due(0, log, listener)
                for step in range(start + 1, run.steps + 1):
                    row = log.append(self._step(step))
                    if listener is not None:
                        listener("step", row)
                    score = self._evaluate_if_due(step, log, listener)
                    if step % run.checkpoint_every == 0 or step == run.steps:
                        self.checkpoints.save(step, self._write_state, score)
            finally:
                log.close()
        return log.rows[-1] if log.rows else {}

    def _step(self, step: int) -> dict[str, Any]:
        """One training step; returns its metrics."""
        begin = time.perf_counter()
        acted = self._act(step)
        learning = time.perf_counter()
        metrics = self._learn(acted, step)
        end = time.perf_counter()
        return {
            "step": step, **reward_metrics(acted.rewards, acted.groups, acted.with_experience), **metrics,
            **rollout_metrics(acted.rollouts, acted.with_experience), **snapshot_metrics(self.snapshot),
            **acted.seconds, "seconds_update": end - learning, "seconds_step": end - begin,
        }  # fmt: skip

    def _act(self, step: int) -> ActedStep:
        """Rollouts of the current weights on the questions of ``step``, judged and written to the run directory."""
        begin = time.perf_counter()
        config = self.config
        batch = self.task.training(step, config.run.questions_per_step)
        size = config.rollout.group_size
        questions = [question for question in batch.questions for _ in range(size)]
        groups = np.repeat(np.arange(len(batch.questions)), size)
        indices = np.tile(np.arange(size), len(batch.questions)).tolist()
        # Rollouts of a group differ by nothing but their seed, so taking the first ones is taking random ones.
        informed = round(config.experience.experience_share * size) if self.snapshot is not None else 0
        with_experience = [index < informed for index in indices]
        rollouts = self._actor.run(
            questions,
            tool=batch.tool,
            snapshot=self.snapshot,
            with_experience=with_experience,
            indices=indices,
            seeds=[rollout_seed(config.run.seed, step, int(g), i) for g, i in zip(groups, indices, strict=True)],
            policy_step=step - 1,
            sampling=Sampling(config.rollout.temperature, config.rollout.top_p),
            label=f"step {step} of {config.run.steps}: rollouts",
        )
        acted = time.perf_counter()
        rewards = score_rollouts(rollouts, questions, self.task, config.task.metric, config.task.malformed_reward)
        self.directory.write_rollouts(step, rollouts)
        check_rewards(rewards, rollouts, config.algorithm.nan_reward)
        seconds = {"seconds_rollout": acted - begin, "seconds_score": time.perf_counter() - acted}
        return ActedStep(questions, rollouts, rewards, groups, with_experience, seconds)

    def _learn(self, acted: ActedStep, step: int) -> dict[str, Any]:
        """Advantages and update; zero-variance groups, NaN rewards and rollouts without sampled tokens stay out."""
        settings = self.config.algorithm
        rewards = acted.rewards
        result = group_advantage(rewards, acted.groups, preset=settings.advantage_preset, nan=settings.nan_reward)
        out = np.asarray(result.zero_variance) | np.isnan(rewards)
        trained = [i for i, rollout in enumerate(acted.rollouts) if not out[i] and trainable(rollout)]
        self.model.train(self.config.model.gradient_checkpointing)
        try:
            return self._update.run(acted.rollouts, np.asarray(result.advantages), trained, step)
        finally:
            self.model.eval()

    def evaluate(self, step: int = 0) -> dict[str, Any]:
        """``{"step", "without_hek", "with_hek"}`` of the current weights over the evaluation questions."""
        settings = self.config.evaluation

        def act(questions: Sequence[Question], tool: Any, snapshot: Any) -> list[Rollout]:
            return self._actor.answer(questions, tool, snapshot, policy_step=step)

        result = evaluate(
            act, self.task, evaluation_batches(self.task, settings.questions),
            self.snapshot if settings.with_hek else None,
            metric=self.config.task.metric, malformed_reward=self.config.task.malformed_reward,
        )  # fmt: skip
        return {"step": step, **result}

    def _evaluate_if_due(self, step: int, log: MetricsLog, listener: Listener | None) -> float | None:
        """Evaluate where the config asks for it; returns the score that decides which checkpoint is the best."""
        every, last = self.config.evaluation.every, self.config.run.steps
        due = step in (0, last) or (every > 0 and step % every == 0)
        if not due or not evaluation_batches(self.task, self.config.evaluation.questions):
            return None
        result = self.directory.read_evaluation(step)
        if result is None:
            result = self.evaluate(step)
            self.directory.write_evaluation(step, result)
        for arm in ("without_hek", "with_hek"):
            log.scalars(f"eval_{arm}", result[arm] or {}, step)
        if listener is not None:
            listener("evaluation", result)
        # The arm that the run trains decides.
        informed = result["with_hek"] is not None and self.config.experience.experience_share > 0
        return float(result["with_hek" if informed else "without_hek"]["reward"])

    def _write_state(self, folder: Path) -> None:
        """The files of a checkpoint; ``model/`` loads with from_pretrained."""
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def _resume(self) -> int:
        """Load the last whole checkpoint and forget what came after it; returns its step, 0 for a fresh start."""
        found = self.checkpoints.latest()
        step = 0 if found is None else found[0]
        if found is not None:
            saved = type(self.model).from_pretrained(found[1] / "model", dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(torch.load(found[1] / "optimizer.pt", weights_only=True))
        self.directory.rewind(step)
        if self.snapshot is not None:
            self.directory.pin_snapshot(self.snapshot)
        self.tokenizer.save_pretrained(self.directory.path / "tokenizer")
        return step
