"""One policy update: log-probs of the trained tokens under old, reference and current weights, loss, optimiser.

What a step computes does not depend on how it is cut into micro-batches: all losses of one optimiser update are divided
by the update's own count of tokens or sequences, so the gradients of its micro-batches add up to the whole. That is why
an update that runs out of memory may be done again in smaller pieces (memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiexp.agent.record import Rollout
from hiexp.clock import Clock
from hiexp.ops.policy_loss import PolicyLoss
from hiexp.rl.batch import (
    MicroBatch,
    engine_logprobs,
    microbatches,
    packed_engine_logprobs,
    sampled_positions,
    trainable,
)
from hiexp.rl.config import AlgorithmConfig
from hiexp.rl.distributed import Ranks, to_cpu
from hiexp.rl.faults import non_finite
from hiexp.rl.gradients import make_gradients
from hiexp.rl.importance import importance_weights
from hiexp.rl.kl import KLController
from hiexp.rl.losses import find_loss
from hiexp.rl.memory import TokenBudget, is_out_of_memory
from hiexp.rl.model import packs_prefixes
from hiexp.rl.schedule import learning_rate
from hiexp.rl.totals import Totals

Array = np.ndarray[Any, Any]
_OBSERVED = 16  # rollouts that stand for a step that trains none


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs ``(n_i,)`` of the trained tokens of rollout i, by i, before the update; None where they are not needed.

    ``old``: denominator of the ratio; None means the policy itself, so that every ratio is 1. ``stale``: it is what the
    engine sampled with, not what the trainer computes for the same weights.
    """

    old: dict[int, Any] | None
    reference: dict[int, Any] | None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """What one optimiser update is made from; ``measured``: the engine's mismatch is taken from its rollouts."""

    rollouts: Sequence[Rollout]
    advantages: Array
    rewards: Array | None
    indices: list[int]
    scores: Scores
    step: int
    measured: bool


class PolicyUpdate:
    """Turns scored rollouts into a new policy.

    Args:
        scorer: the policy, prepared by accelerate.
        reference: frozen starting policy, None where the loss has no KL term.
        optimizer: AdamW over the policy's parameters.
        accelerator: the engine that prepared them.
        config: algorithm settings.
        pad_id: token id for padding.
        constant_length: most sampled tokens of a rollout, the divisor of dr_grpo.
        seed: with the step, decides the order of minibatches.
        faults: folder for batches whose loss is not finite, None writes none.
        kl_in_reward: the KL term is in the rewards already and stays out of the loss.
        ranks: the processes that share the work; None is this one alone.
        packed: whether rollouts share prefixes, see :func:`hiexp.rl.model.packs_prefixes`; None tries it out.

    ``clock``: seconds of the parts, see :data:`hiexp.rl.metrics.TIME_KEYS`.
    """

    def __init__(
        self,
        scorer: Any,
        reference: Any,
        optimizer: Any,
        accelerator: Any,
        config: AlgorithmConfig,
        *,
        pad_id: int,
        constant_length: int,
        seed: int,
        faults: Path | None = None,
        kl_in_reward: bool = False,
        ranks: Ranks | None = None,
        packed: bool | None = None,
    ) -> None:
        self.scorer, self.reference, self.optimizer, self.accelerator = scorer, reference, optimizer, accelerator
        self.config, self.pad_id, self.seed, self.faults = config, pad_id, seed, faults
        self.kl_in_reward, self.ranks = kl_in_reward, Ranks() if ranks is None else ranks
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.budget = TokenBudget(config.tokens_per_microbatch)
        self.clock = Clock()
        self._gradients = make_gradients(scorer, optimizer, accelerator, config.max_grad_norm)
        self._packed = packs_prefixes(accelerator.unwrap_model(scorer).model) if packed is None else packed
        self._recipe, self._clip = find_loss(config.kind), config.clip_range
        aggregation = config.aggregation or self._recipe.aggregation
        # The sum over a rollout's tokens is the constant aggregation with length 1.
        self._constant_length = {"constant": constant_length, "sum": 1}.get(aggregation)
        self._aggregation = "constant" if aggregation == "sum" else aggregation

    def score(
        self, rollouts: Sequence[Rollout], indices: Sequence[int], step: int, staleness: int = 0, *, whole: bool = False
    ) -> Scores:
        """Old and reference log-probs of the rollouts ``indices`` as far as the update needs them; ``whole``: both.

        ``staleness``: updates since the weights that made the rollouts. Above 0 the policy is not the one that acted,
        so the ratio is taken to what the engine sampled with; with ``importance_cap`` it stays the trainer's, and the
        cap bounds the rest (decoupled objective, Hilton et al. 2021, arXiv:2110.00641; AReaL, arXiv:2505.24298).
        """
        engine = self.config.ratio_to_engine(staleness > 0)
        old = None
        if engine:
            old = {i: engine_logprobs(rollouts[i], self.accelerator.device) for i in indices}
        elif self._several_updates or self._weighs or whole:
            with self.clock.part("old_logprobs"):
                old = self._score_all(self.scorer, rollouts, indices, step)
        reference = None
        if self.reference is not None:
            with self.clock.part("reference"):
                reference = self._score_all(self.reference, rollouts, indices, step)
        return Scores(old, reference, engine)

    def run(
        self,
        rollouts: Sequence[Rollout],
        advantages: Array,
        trained: Sequence[int],
        step: int,
        *,
        rewards: Array | None = None,
        scores: Scores | None = None,
        staleness: int = 0,
    ) -> dict[str, float]:
        """Update the policy on the rollouts ``trained``; ``advantages`` ``(len(rollouts),)``.

        ``rewards`` are for the record of a batch that fails; ``scores`` of all of ``trained`` are made here where None,
        with ``staleness``, see :meth:`score`.

        Returns lr, loss, grad_norm, kl_coef, oom_retries, trained_tokens, and as token means over all updates
        :data:`hiexp.rl.totals.REPORTED` and the loss's own; engine_mismatch (|engine log-prob - trainer's before the
        update|), its maximum and its share beyond the bound over all tokens or, where the ratio is taken to the
        engine's log-probs, over those of the first minibatch: the trainer's come from the update itself there. With
        nothing to train there is lr alone, and weights and optimiser moments stay as they are.

        Raises:
            NonFiniteError: loss or gradient is not finite; the weights are those before the update.
            MemoryError: a single rollout does not fit.
        """
        lr = self._set_learning_rate(step)
        if not trained:
            return {"lr": lr}
        scores = self.score(rollouts, trained, step, staleness) if scores is None else scores
        totals, losses, norms = Totals(), list[float](), list[float]()
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.seed, step, epoch]).permutation(np.asarray(trained))
            for minibatch in np.array_split(order, min(self.config.minibatches, len(order))):
                # The trainer's log-probs before the update: scored, or those of the first minibatch.
                measured = not losses if scores.stale else epoch == 0
                job = _Job(rollouts, advantages, rewards, minibatch.tolist(), scores, step, measured)
                loss, norm = self._optimise(job, totals)
                losses.append(loss)
                norms.append(norm)
        metrics = {
            "lr": lr, "loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), **totals.metrics(),
            "trained_tokens": _trained_tokens(rollouts, trained), "oom_retries": self.budget.retries,
            "kl_coef": self.kl.coefficient,
        }  # fmt: skip
        self.budget.retries = 0
        self.kl.update(metrics.get("kl_ref"), len(trained))
        return metrics

    def kl_penalty(self, scores: Scores, rollouts: int) -> Array:
        """(rollouts,) what the KL term takes off each reward: coefficient * sum over its tokens of old - reference."""
        assert scores.old is not None
        assert scores.reference is not None
        penalty = np.zeros(rollouts)
        for i, old in scores.old.items():
            penalty[i] = self.kl.coefficient * float((old.double() - scores.reference[i].double()).sum())
        return penalty

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides weights and optimiser."""
        shrunk = self.budget.tokens < self.config.tokens_per_microbatch
        return {"kl": self.kl.state_dict(), "tokens_per_microbatch": self.budget.tokens if shrunk else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.kl.load_state_dict(state["kl"])
        if state["tokens_per_microbatch"] is not None:
            # What did not fit before does not fit now.
            self.budget.tokens = min(self.budget.tokens, int(state["tokens_per_microbatch"]))

    @property
    def _several_updates(self) -> bool:
        # With a single update per step the policy is still the one that acted, every ratio is 1, and a forward pass is
        # saved.
        return self.config.epochs * self.config.minibatches > 1

    @property
    def _weighs(self) -> bool:
        """Whether importance weights are made here: those of single tokens are cut inside the fused loss."""
        mode, cap = self.config.importance_mode, self.config.importance_cap
        return cap is not None and (mode != "token_truncate" or self._recipe.function is not None)

    @property
    def _truncates(self) -> bool:
        """Whether the fused loss cuts the importance weights."""
        return self.config.importance_cap is not None and not self._weighs

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _batches(self, rollouts: Sequence[Rollout], indices: Sequence[int], budget: int) -> list[MicroBatch]:
        """This rank's share of the micro-batches of ``indices``."""
        device = self.accelerator.device
        return microbatches(rollouts, indices, budget, self.pad_id, device, packed=self._packed, ranks=self.ranks)

    def _within_memory(self, work: Any, rollouts: Sequence[Rollout], indices: Sequence[int], what: str) -> Any:
        """``work(micro-batches)``, in smaller ones where memory runs out."""

        def clean() -> None:
            if self.ranks.size > 1:
                # The other ranks wait in a reduction that this one will not reach: only a restart helps.
                raise MemoryError(f"{what}: out of memory on one rank; lower algorithm.tokens_per_microbatch")
            self._gradients.drop()

        return self.budget.run(lambda budget: self._batches(rollouts, indices, budget), work, clean, what)

    def observe(self, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
        """entropy, engine_mismatch and, with a reference, kl_ref of some rollouts of a step that trains nothing.

        So a policy that has collapsed, whose groups no longer differ, does not blind the alarms.
        """
        usable = [i for i, rollout in enumerate(rollouts) if trainable(rollout)]
        chosen = usable[:: max(1, len(usable) // _OBSERVED)][:_OBSERVED]

        def work(batches: Sequence[MicroBatch]) -> Totals:
            totals = Totals()
            for batch in batches:
                scores = self.scorer(batch, entropy=True)
                reference = None if self.reference is None else self.reference(batch).logprobs
                if not batch.filler:
                    engine = packed_engine_logprobs(rollouts, batch)
                    totals.add_scores(scores, reference, engine, self.config.kl_estimator)
            return totals

        totals = Totals()
        if chosen:
            for part in self.ranks.gather(self._look(work, rollouts, chosen, f"step {step}, observing")):
                totals.merge(part)
        retries, self.budget.retries = self.budget.retries, 0
        return {**totals.metrics(), "oom_retries": retries}

    @torch.no_grad()
    def _look(self, work: Any, rollouts: Sequence[Rollout], indices: Sequence[int], what: str) -> Any:
        """``work(micro-batches)`` without gradient."""
        # Dropout of an adapter belongs to the update alone.
        training = self.scorer.training
        self.scorer.eval()
        try:
            return self._within_memory(work, rollouts, indices, what)
        finally:
            self.scorer.train(training)

    def _score_all(self, scorer: Any, rollouts: Sequence[Rollout], indices: Sequence[int], step: int) -> dict[int, Any]:
        """Rollout index -> log-probs ``(n_i,)`` of its trained tokens, the scores of all ranks."""

        def work(batches: Sequence[MicroBatch]) -> dict[int, Any]:
            scores: dict[int, Any] = {}
            for batch in batches:
                pieces = scorer(batch).logprobs.tensor_split(batch.cu_seqlens[1:-1].cpu())
                if not batch.filler:
                    scores.update(zip(batch.indices, pieces, strict=True))
            return scores

        scores: dict[int, Any] = self._look(work, rollouts, indices, f"step {step}, scoring")
        if self.ranks.size == 1:
            return scores
        device = self.accelerator.device
        return {i: score.to(device) for part in self.ranks.gather(to_cpu(scores)) for i, score in part.items()}

    def _optimise(self, job: _Job, totals: Totals) -> tuple[float, float]:
        """One optimiser update over the rollouts of ``job``; returns loss and gradient norm."""
        what = f"step {job.step}, update"
        loss, found = self._within_memory(partial(self._backward, job), job.rollouts, job.indices, what)
        for part in self.ranks.gather(found):
            totals.merge(part)
        loss = self.ranks.sum({"loss": loss})["loss"]
        with self.clock.part("backward"):
            if self.accelerator.device.type == "cuda":  # what is still under way belongs to it
                torch.cuda.synchronize()
        with self.clock.part("optimiser"):
            norm = self._clip_and_step(job.step)
        if not np.isfinite(norm):
            # It is the sum over all micro-batches: any of them may have spoiled it.
            raise self._fault(f"the gradient is not finite ({norm})", job, job.indices, {})
        return loss, norm

    def _clip_and_step(self, step: int) -> float:
        try:
            return self._gradients.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            # Parameters may be half changed, and smaller micro-batches would not help: the checkpoint is what is left.
            raise MemoryError(
                f"step {step}, optimiser: out of memory ({reason}). Its moments take twice the memory of the "
                "trained weights: train an adapter (model.lora_rank), use more processes (docs/distributed.md), or "
                "free memory on this device; the same command continues"
            ) from error

    def _backward(self, job: _Job, batches: Sequence[MicroBatch]) -> tuple[float, Totals]:
        """Gradients of all micro-batches; returns this rank's part of the update's loss."""
        # Of the whole update, not of this rank's share: gradients of all ranks add up to those of one process.
        denominator = float(len(job.indices))
        if self._aggregation == "token":
            denominator = float(_trained_tokens(job.rollouts, job.indices))
        total, totals = 0.0, Totals()
        for number, batch in enumerate(batches, start=1):
            tokens, found = self._tokens(job, batch), Totals()
            arguments = self._arguments(job, batch, tokens, denominator, found)
            with self._gradients.adding(last=number == len(batches)):
                result = self._forward_backward(job, batch, tokens, arguments)
            if batch.filler:
                continue
            total += float(result.loss.detach())
            totals.merge(found)
            totals.add_loss(result.metrics, truncates=self._truncates)
            if job.measured:
                before = result.logprobs if tokens["old"] is None or job.scores.stale else tokens["old"]
                totals.add_mismatch(before, tokens["engine"])
        return total, totals

    def _forward_backward(
        self, job: _Job, batch: MicroBatch, tokens: dict[str, Any], arguments: dict[str, Any]
    ) -> PolicyLoss:
        """Adds the gradient of one micro-batch; a loss that is not finite ends the step before that."""
        with self.clock.part("forward"):
            result: PolicyLoss = self.scorer(batch, loss=arguments)
            loss = float(result.loss.detach())
        if not np.isfinite(loss) or result.metrics["nonfinite_tokens"]:
            self._gradients.drop()
            found = tokens | {"logprobs": result.logprobs}
            raise self._fault(f"the loss is not finite ({loss})", job, batch.indices, found)
        # The engines of accelerate average gradients over ranks; what a filler computes counts for nothing.
        with self.clock.part("backward"):
            self._gradients.backward(result.loss * (0.0 if batch.filler else float(self.ranks.size)))
        return result

    def _tokens(self, job: _Job, batch: MicroBatch) -> dict[str, Any]:
        """Log-probs (N,) of the batch's trained tokens: old, reference, engine; None where there are none."""
        return {
            "old": _gather(job.scores.old, batch),
            "reference": _gather(job.scores.reference, batch),
            "engine": packed_engine_logprobs(job.rollouts, batch),
        }

    def _arguments(
        self, job: _Job, batch: MicroBatch, tokens: dict[str, Any], denominator: float, totals: Totals
    ) -> dict[str, Any]:
        """Arguments of ``linear_policy_loss`` or of ``registered_loss``."""
        config, function = self.config, self._recipe.function
        advantages = torch.as_tensor(job.advantages[batch.indices], dtype=torch.float32, device=batch.targets.device)
        weights = None
        if self._weighs and config.importance_cap is not None:
            weights, cut = importance_weights(
                tokens["old"], tokens["engine"], batch.cu_seqlens, config.importance_mode, config.importance_cap
            )
            totals.add_cut(cut)
        shared = {
            "old_logprobs": tokens["old"], "ref_logprobs": tokens["reference"], "engine_logprobs": tokens["engine"],
            "denominator": denominator, "aggregation": self._aggregation, "constant_length": self._constant_length,
            "clip_low": self._clip[0], "clip_high": self._clip[1], "kl_estimator": config.kl_estimator,
            "kl_coef": 0.0 if self.kl_in_reward else self.kl.coefficient,
        }  # fmt: skip
        if function is not None:
            own = {"function": function, "importance": weights, "loss_settings": config.loss_settings}
            return {**shared, **own, "advantages": advantages}
        if weights is not None:
            # Every fused policy term is linear in the advantage, so its weight goes there.
            advantages = advantages.repeat_interleave(batch.cu_seqlens.diff()) * weights
        truncation = config.importance_cap if self._truncates else None
        return {**shared, "kind": self._recipe.fused, "advantages": advantages, "truncation": truncation}

    def _fault(self, what: str, job: _Job, indices: Sequence[int], tokens: dict[str, Any]) -> Exception:
        values = {"reward": job.rewards, "advantage": job.advantages}
        return non_finite(what, job.step, job.rollouts, indices, tokens, values, self.faults)


def _trained_tokens(rollouts: Sequence[Rollout], indices: Sequence[int]) -> int:
    return sum(len(sampled_positions(rollouts[i])) for i in indices)


def _gather(scores: dict[int, Any] | None, batch: MicroBatch) -> Any:
    return None if scores is None else torch.cat([scores[i] for i in batch.indices])
