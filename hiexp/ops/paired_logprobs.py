"""Log-probs of the same tokens under two hidden states, and the exact KL between the two distributions, in one pass.

The two sides may be the policy with and without experience in its prompt, or the policy and its reference. A sampled
estimate of the KL needs the log-probs alone; the exact one needs both rows of logits together, tile by tile.
See _logprob_pair.py for the algorithm and _logprob_pair_operator.py for autograd.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import reference_paired
from hiexp.ops._checks import check_choice, describe
from hiexp.ops._logprob_pair_operator import operator
from hiexp.ops.token_logprobs import _check_rows, _check_targets, _check_temperature, _check_tensors

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.paired_logprobs")

IMPLEMENTATIONS = ("torch", "triton", "reference")


@dataclass(frozen=True)
class PairedLogprobs:
    """Per-token results of :func:`paired_logprobs`, (R,) each, float32 (float64 for float64 inputs).

    Attributes:
        logprobs_a, logprobs_b: log softmax of the target under each side, in nats, never above 0. Differentiable.
        kl: KL(a || b) = sum over the vocabulary of p_a (log p_a - log p_b), in nats, never below 0. Differentiable.
        lse_a, lse_b: log-sum-exp of the logits after the temperature. Differentiable.
        finite: bool, no gradient. False where a NaN or an infinite number spoilt the row, on either side, or where its
            target is forbidden by a bias of -inf. Such a row spoils no other, as in ``token_logprobs``.
    """

    logprobs_a: torch.Tensor
    logprobs_b: torch.Tensor
    kl: torch.Tensor
    lse_a: torch.Tensor
    lse_b: torch.Tensor
    finite: torch.Tensor


def paired_logprobs(
    hidden_a: torch.Tensor,
    hidden_b: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight_b: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    impl: str | None = None,
) -> PairedLogprobs:
    """Log-probs of ``targets`` under ``softmax((hidden @ weight.T + bias) / temperature)`` of both sides, and their KL.

    Args:
        hidden_a: (T, H) final hidden states of side a; row t predicts ``targets[t]``.
        hidden_b: (T, H') those of side b for the same tokens, of the same dtype. Detach it to make it a reference.
        weight: (V, H) LM head of side a, and of side b unless ``weight_b`` is given.
        targets: (T,) integer token ids; entries outside ``rows`` are not looked at.
        weight_b: (V, H') LM head of side b, of the dtype of ``weight``; H' may differ from H.
        rows: the rows to score: a (T,) bool mask or an integer index tensor (R,). None scores all, R = T.
        bias: (V,) or None, the same for both sides. Entries of -inf are allowed (forbidden tokens).
        temperature: positive number, or (T,) tensor with one a row, the same for both sides.
        impl: None picks by the device: ``"triton"`` on a GPU, ``"torch"`` on a CPU; ``"reference"`` for tests.

    Gradients flow to both hidden states, both weights and the bias. Work: 4THV floating point operations forward, 12THV
    backward for both sides. Logits are computed again in backward; two tiles of them are alive at any time.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, or a target outside the vocabulary (the row is named).
    """
    _check_sides(hidden_a, hidden_b, weight, weight_b, targets, bias)
    temperature = _check_temperature(temperature, hidden_a)
    if rows is not None:
        rows = _check_rows(rows, hidden_a)
        hidden_a, hidden_b, targets = hidden_a[rows], hidden_b[rows], targets[rows]
        temperature = None if temperature is None else temperature[rows]
    _check_targets(targets, weight.shape[0], rows)
    impl = _choose_implementation(impl, hidden_a)
    if impl == "reference":
        options = {"weight_b": weight_b, "bias": bias, "temperature": temperature}
        results = reference_paired.paired_logprobs(hidden_a, hidden_b, weight, targets, **options)
        if torch.float64 not in (hidden_a.dtype, weight.dtype):
            results = tuple(x.float() for x in results)
    else:
        results = operator(hidden_a, hidden_b, weight, weight_b, targets.long(), bias, temperature, impl)
    finite = torch.stack([torch.isfinite(x.detach()) for x in results]).all(0)
    return PairedLogprobs(*results, finite)


def _check_sides(hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any) -> None:
    try:
        _check_tensors(hidden_a, weight, targets, bias)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("hidden", "hidden_a")) from None
    try:
        _check_tensors(hidden_b, weight if weight_b is None else weight_b, targets, None)
    except (TypeError, ValueError) as error:
        names = str(error).replace("hidden", "hidden_b").replace("weight", "weight" if weight_b is None else "weight_b")
        raise type(error)(names) from None
    if hidden_b.device != hidden_a.device:
        raise ValueError(f"hidden_b: expected a tensor on {hidden_a.device}, where hidden_a is, got {hidden_b.device}")
    if hidden_b.dtype != hidden_a.dtype:
        raise TypeError(f"hidden_b: expected {hidden_a.dtype}, the dtype of hidden_a, got {describe(hidden_b)}")
    if weight_b is not None and (weight_b.dtype != weight.dtype or len(weight_b) != len(weight)):
        raise ValueError(
            f"weight_b: expected {len(weight)} vocabulary rows of {weight.dtype}, as weight, got {describe(weight_b)}"
        )


def _choose_implementation(impl: str | None, hidden: torch.Tensor) -> str:
    if impl is None:
        return "triton" if hidden.is_cuda else "torch"
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "triton" and not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('impl: expected "torch" or "reference" for tensors on a CPU, got "triton"')
    return impl
