"""One policy update: log-probs of the trained tokens under old, reference and current weights, loss, optimiser.

What a step computes does not depend on how it is cut into micro-batches: all losses of one optimiser update are divided
by the update's own count of tokens or sequences, so the gradients of its micro-batches add up to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from hiexp.agent.record import Rollout
from hiexp.ops._policy_batch import DEFAULT_AGGREGATION
from hiexp.ops.linear_policy_loss import linear_policy_loss
from hiexp.ops.token_logprobs import token_logprobs
from hiexp.rl.batch import MicroBatch, engine_logprobs, microbatches, packed_engine_logprobs, sampled_positions
from hiexp.rl.config import AlgorithmConfig
from hiexp.rl.distributed import Ranks, to_cpu
from hiexp.rl.model import lm_head, packs_prefixes, trained_hidden_states
from hiexp.rl.schedule import learning_rate


class PolicyScorer(torch.nn.Module):
    """The model as a function from micro-batch to log-probs or loss; accelerate wraps it and so sees the forward."""

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: MicroBatch, loss: dict[str, Any] | None = None) -> Any:
        """TokenLogprobs of the batch's trained tokens, or with the arguments ``loss`` their PolicyLoss."""
        rows = trained_hidden_states(self.model, batch)  # (N, H)
        weight, bias = lm_head(self.model)
        head = {"bias": bias, "temperature": self.temperature}
        if loss is None:
            return token_logprobs(rows, weight, batch.targets, **head)
        # Logits and gradients of the head exist a chunk of rows at a time, whatever the micro-batch.
        return linear_policy_loss(
            rows, weight, batch.targets, mask=torch.ones_like(batch.targets), cu_seqlens=batch.cu_seqlens,
            entropy=True, **head, **loss,
        )  # fmt: skip


class PolicyUpdate:
    """Turns scored rollouts into a new policy.

    Args:
        scorer: the policy, prepared by accelerate.
        reference: frozen starting policy, None where the loss has no KL term.
        optimizer: AdamW over the policy's parameters.
        accelerator: does backward, clipping and mixed precision.
        config: algorithm settings.
        pad_id: token id for padding.
        constant_length: most sampled tokens of a rollout, the divisor of dr_grpo.
        seed: with the step, decides the order of minibatches.
        ranks: the processes that share the work; None is this one alone.
    """

    def __init__(
        self,
        scorer: Any,
        reference: PolicyScorer | None,
        optimizer: Any,
        accelerator: Any,
        config: AlgorithmConfig,
        *,
        pad_id: int,
        constant_length: int,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.scorer, self.reference, self.optimizer, self.accelerator = scorer, reference, optimizer, accelerator
        self.config, self.pad_id, self.seed = config, pad_id, seed
        self.ranks = Ranks() if ranks is None else ranks
        self._packed = packs_prefixes(accelerator.unwrap_model(scorer).model)
        self._aggregation = DEFAULT_AGGREGATION[config.kind]
        self._constant_length = constant_length if self._aggregation == "constant" else None

    def run(
        self,
        rollouts: Sequence[Rollout],
        advantages: np.ndarray[Any, Any],
        trained: Sequence[int],
        step: int,
        staleness: int = 0,
    ) -> dict[str, float | None]:
        """Update the policy on the rollouts ``trained``; ``advantages`` ``(len(rollouts),)``.

        ``staleness``: updates since the weights that made the rollouts. Above 0 the policy is not the one that acted,
        so the ratio is taken to what the engine sampled with.

        Returns lr, loss, grad_norm and, as token means over all updates, kl_ref, approx_kl, clip_fraction, entropy and
        engine_mismatch (|engine log-prob - old log-prob|). With nothing to train there is lr alone, and weights and
        optimiser moments stay as they are.

        Raises:
            RuntimeError: the gradient is not finite; the weights are those before the update.
        """
        lr = self._set_learning_rate(step)
        if not trained:
            return {"lr": lr}
        old = self._score_all(self.scorer, rollouts, trained) if self._several_updates else None
        if staleness > 0:
            old = {i: engine_logprobs(rollouts[i], self.accelerator.device) for i in trained}
        reference = self._score_all(self.reference, rollouts, trained) if self.reference is not None else None
        totals = _TokenMeans(self.ranks)
        losses, norms = [], []
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.seed, step, epoch]).permutation(np.asarray(trained))
            for minibatch in np.array_split(order, min(self.config.minibatches, len(order))):
                loss, norm = self._optimise(rollouts, advantages, minibatch.tolist(), old, reference, totals, step)
                losses.append(loss)
                norms.append(norm)
        return {"lr": lr, "loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), **totals.means()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this object besides weights and optimiser, as plain JSON types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    @property
    def _several_updates(self) -> bool:
        # With a single update per step the policy is still the one that acted, every ratio is 1, and a forward pass is
        # saved.
        return self.config.epochs * self.config.minibatches > 1

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _batches(self, rollouts: Sequence[Rollout], indices: Sequence[int]) -> list[MicroBatch]:
        """This rank's share of the micro-batches of ``indices``."""
        budget, device = self.config.tokens_per_microbatch, self.accelerator.device
        return microbatches(rollouts, indices, budget, self.pad_id, device, packed=self._packed, ranks=self.ranks)

    @torch.no_grad()
    def _score_all(self, scorer: Any, rollouts: Sequence[Rollout], indices: Sequence[int]) -> dict[int, Any]:
        """Rollout index -> log-probs ``(n_i,)`` of its trained tokens, the scores of all ranks."""
        scores: dict[int, Any] = {}
        for batch in self._batches(rollouts, indices):
            pieces = scorer(batch).logprobs.tensor_split(batch.cu_seqlens[1:-1].cpu())
            if not batch.filler:
                scores.update(zip(batch.indices, pieces, strict=True))
        if self.ranks.size == 1:
            return scores
        device = self.accelerator.device
        return {i: score.to(device) for part in self.ranks.gather(to_cpu(scores)) for i, score in part.items()}

    def _optimise(
        self,
        rollouts: Sequence[Rollout],
        advantages: np.ndarray[Any, Any],
        indices: list[int],
        old: dict[int, Any] | None,
        reference: dict[int, Any] | None,
        totals: _TokenMeans,
        step: int,
    ) -> tuple[float, float]:
        """One optimiser update over the rollouts ``indices``; returns loss and gradient norm."""
        batches = self._batches(rollouts, indices)
        # Of the whole update, not of this rank's share: gradients of all ranks add up to those of one process.
        denominator = float(len(indices))
        if self._aggregation == "token":
            denominator = float(sum(len(sampled_positions(rollouts[i])) for i in indices))
        total_loss = 0.0
        for number, batch in enumerate(batches, start=1):
            settings = {
                # None: the policy is still the one that acted.
                "old_logprobs": None if old is None else _gather(old, batch),
                "advantages": torch.as_tensor(advantages[batch.indices], dtype=torch.float32),
                "ref_logprobs": None if reference is None else _gather(reference, batch),
                "engine_logprobs": packed_engine_logprobs(rollouts, batch),
                "denominator": denominator,
                **self._loss_settings(),
            }
            with self._gradients_met(number == len(batches)):
                result = self.scorer(batch, loss=settings)
                # The engines of accelerate average gradients over ranks.
                self.accelerator.backward(result.loss * (0.0 if batch.filler else float(self.ranks.size)))
            if not batch.filler:
                total_loss += float(result.loss.detach())
                totals.add(result.metrics)
        total_loss = self.ranks.sum({"loss": total_loss})["loss"]
        norm = float(self.accelerator.clip_grad_norm_(self.scorer.parameters(), self.config.max_grad_norm))
        if not np.isfinite(norm):
            raise RuntimeError(f"step {step}: the gradient is not finite ({norm}); lower algorithm.lr or use float32")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total_loss, norm

    def _gradients_met(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange the gradients of an update once, with its last micro-batch."""
        if self.ranks.size == 1 or last:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.scorer)
        return context

    def _loss_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "kind": config.kind,
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "kl_coef": config.kl_coef,
            "kl_estimator": config.kl_estimator,
            "truncation": config.importance_cap,
            "constant_length": self._constant_length,
        }


def _gather(scores: dict[int, Any], batch: MicroBatch) -> Any:
    return torch.cat([scores[i] for i in batch.indices])


# Metric of a step -> metric of the loss.
_REPORTED = {
    "kl_ref": "kl_ref",
    "approx_kl": "approx_kl",
    "clip_fraction": "clip_fraction",
    "entropy": "entropy",
    "engine_mismatch": "engine_gap",
}


class _TokenMeans:
    """Token-weighted means over micro-batches, those of all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, float] = {"tokens": 0.0}

    def add(self, metrics: dict[str, float]) -> None:
        tokens = int(metrics["tokens"])
        self._sums["tokens"] += tokens
        for name, key in _REPORTED.items():
            if key in metrics:
                self._sums[name] = self._sums.get(name, 0.0) + metrics[key] * tokens

    def means(self) -> dict[str, float]:
        sums = self._ranks.sum(self._sums)
        tokens = sums.pop("tokens")
        return {name: total / tokens for name, total in sums.items()}
