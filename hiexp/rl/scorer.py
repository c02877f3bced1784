"""The model as one function of a micro-batch: log-probs of its trained tokens, or the policy loss on them."""

from __future__ import annotations

from typing import Any

import torch

from hiexp.ops.linear_policy_loss import linear_policy_loss
from hiexp.ops.token_logprobs import token_logprobs
from hiexp.rl.batch import MicroBatch
from hiexp.rl.model import lm_head, trained_hidden_states
from hiexp.rl.registered_loss import registered_loss


class PolicyScorer(torch.nn.Module):
    """The model as a function from micro-batch to log-probs or loss; accelerate wraps it and so sees the forward."""

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: MicroBatch, loss: dict[str, Any] | None = None, entropy: bool = False) -> Any:
        """TokenLogprobs of the batch's trained tokens, or with the arguments ``loss`` their PolicyLoss."""
        rows = trained_hidden_states(self.model, batch)  # (N, H)
        weight, bias = lm_head(self.model)
        head = {"bias": bias, "temperature": self.temperature}
        if loss is None:
            return token_logprobs(rows, weight, batch.targets, entropy=entropy, **head)
        if "function" in loss:
            scores = token_logprobs(rows, weight, batch.targets, entropy=True, **head)
            return registered_loss(scores=scores, cu_seqlens=batch.cu_seqlens, **loss)
        # Logits and gradients of the head exist a chunk of rows at a time, whatever the micro-batch.
        return linear_policy_loss(
            rows, weight, batch.targets, mask=torch.ones_like(batch.targets), cu_seqlens=batch.cu_seqlens,
            entropy=True, **head, **loss,
        )  # fmt: skip
