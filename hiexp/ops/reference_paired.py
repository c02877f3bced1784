"""Slow, obvious float64 version of ``paired_logprobs``: the oracle of its tests, from the formulas alone."""

from __future__ import annotations

from typing import Any

from hiexp._extras import require
from hiexp.ops import reference


def paired_logprobs(
    hidden_a: Any,
    hidden_b: Any,
    weight: Any,
    targets: Any,
    *,
    weight_b: Any = None,
    bias: Any = None,
    temperature: Any = None,
) -> tuple[Any, Any, Any, Any, Any]:
    """(log-probs a, log-probs b, KL(a || b), log-sum-exp a, log-sum-exp b), (T,) each, float64; differentiable."""
    torch = require("torch", "train", "hiexp.ops.reference_paired")
    sides = []
    for hidden, head in ((hidden_a, weight), (hidden_b, weight if weight_b is None else weight_b)):
        logits = hidden.double() @ head.double().T  # (T, V)
        if bias is not None:
            logits = logits + bias.double()
        if temperature is not None:
            logits = logits / temperature.double()[:, None]
        sides.append(torch.log_softmax(logits, 1))
    log_p, log_q = sides
    allowed = log_p > -torch.inf
    difference = torch.where(allowed, log_p, 0.0) - torch.where(allowed, log_q, 0.0)
    kl = (log_p.exp() * difference).sum(1)
    options = {"bias": bias, "temperature": temperature}
    logprobs_a, _, lse_a = reference.token_logprobs(hidden_a, weight, targets, **options)
    logprobs_b, _, lse_b = reference.token_logprobs(
        hidden_b, weight if weight_b is None else weight_b, targets, **options
    )
    return logprobs_a, logprobs_b, kl, lse_a, lse_b
