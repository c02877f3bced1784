"""Log-probs of given tokens from hidden states and the LM head, without ever holding the (T, V) logits.

Forward costs one product of 2THV floating point operations, backward three, since the logits are computed again.
See _logprob_tiles.py for the algorithm and _logprob_operator.py for autograd.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import reference
from hiexp.ops._checks import check_choice, check_flag, check_number, check_shape, describe, is_tensor
from hiexp.ops._logprob_operator import operator

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.token_logprobs")

IMPLEMENTATIONS = ("native", "torch", "triton", "persistent", "reference")


@dataclass(frozen=True)
class TokenLogprobs:
    """Per-token results of :func:`token_logprobs`, (R,) each, float32 (float64 for float64 inputs), all differentiable.

    Attributes:
        logprobs: log softmax of the target, in nats, never above 0.
        entropy: entropy of the softmax in nats, None unless asked for.
        lse: log-sum-exp of the logits after the temperature.
        finite: bool, no gradient. False where a NaN or an infinite number in the row of ``hidden`` (or in ``weight``)
            spoilt the row, or where its target is forbidden by a bias of -inf. Such a row spoils no other: a loss over
            ``logprobs.where(finite, 0)`` and its gradients are those without it.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor
    finite: torch.Tensor


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = False,
    impl: str | None = None,
) -> TokenLogprobs:
    """Log-probability of ``targets`` under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: (T, H) final hidden states; row t predicts ``targets[t]``.
        weight: (V, H) LM head; may be frozen, tied to the embedding, or of another dtype than ``hidden``.
        targets: (T,) integer token ids; entries outside ``rows`` are not looked at, they may hold padding such as -100.
        rows: the rows to score: a (T,) bool mask or an integer index tensor (R,). None scores all, R = T. Only these
            rows are multiplied; in backward, only those of them whose upstream gradient is not zero.
        bias: (V,) or None. Entries of -inf are allowed (forbidden tokens).
        temperature: positive number, or (T,) tensor with one a row (no gradient flows to it).
        entropy: also compute the entropy, with its gradient.
        impl: None picks by the device: ``"triton"`` on a GPU, ``"native"`` (C++) on a CPU. ``"torch"`` needs
            neither; ``"reference"`` computes all logits in float64. These two are for tests and other devices.
            ``"persistent"``: forward in one Triton kernel, where a row's result does not depend on the number of rows,
            to the last bit; backward as with ``"triton"``.

    Half-precision inputs are accumulated in float32. At most 256 MB of logits are alive at any time.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, or a target outside the vocabulary (the row is named).
    """
    _check_tensors(hidden, weight, targets, bias)
    check_flag("entropy", entropy)
    temperature = _check_temperature(temperature, hidden)
    if rows is not None:
        rows = _check_rows(rows, hidden)
        hidden, targets = hidden[rows], targets[rows]
        temperature = None if temperature is None else temperature[rows]
    _check_targets(targets, weight.shape[0], rows)
    impl = _choose_implementation(impl, hidden, weight)
    if impl == "reference":
        return _reference(hidden, weight, targets, bias, temperature, entropy)
    keep = _will_have_backward(hidden, weight, bias)
    logprobs, entropies, lse, _ = operator(hidden, weight, targets.long(), bias, temperature, entropy, impl, keep)
    return _result(logprobs, entropies if entropy else None, lse)


def _result(logprobs: torch.Tensor, entropy: torch.Tensor | None, lse: torch.Tensor) -> TokenLogprobs:
    return TokenLogprobs(logprobs, entropy, lse, torch.isfinite(logprobs.detach()) & torch.isfinite(lse.detach()))


def _will_have_backward(*inputs: torch.Tensor | None) -> bool:
    """Whether to keep logits for a backward pass. Not under torch.compile: how many fit is known at run time only."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in inputs)


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any) -> None:
    for name, value, dimensions in (("hidden", hidden, "(T, H)"), ("weight", weight, "(V, H)")):
        if not is_tensor(value) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating point torch tensor {dimensions}, got {describe(value)}")
        if value.ndim != 2:
            raise ValueError(f"{name}: expected a 2-D tensor {dimensions}, got {describe(value)}")
    if not is_tensor(targets) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets: expected an integer torch tensor (T,), got {describe(targets)}")
    tokens, width = hidden.shape
    vocabulary, width_ = weight.shape
    if width != width_:
        raise ValueError(f"weight: expected {width} columns, as many as hidden has, got {describe(weight)}")
    if vocabulary == 0:
        raise ValueError(f"weight: expected at least one vocabulary row, got {describe(weight)}")
    check_shape("targets", targets, (tokens,), "one target a row of hidden")
    if bias is not None:
        if not is_tensor(bias):
            raise TypeError(f"bias: expected a torch tensor (V,), got {describe(bias)}")
        check_shape("bias", bias, (vocabulary,), "one entry a vocabulary row")
    for name, value in (("weight", weight), ("targets", targets), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"{name}: expected a tensor on {hidden.device}, where hidden is, got one on {value.device}"
            )


def _check_temperature(temperature: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """(T,) tensor of positive temperatures, None for the number 1. A number keeps all its digits for float64 inputs."""
    if not is_tensor(temperature):
        value = check_number("temperature", temperature, 0.0, exclusive=True)
        double = {"dtype": torch.float64, "device": hidden.device}
        return None if value == 1.0 else torch.full((hidden.shape[0],), value, **double)
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient, got one that requires it")
    if temperature.ndim == 0:
        temperature = temperature.expand(hidden.shape[0])
    check_shape("temperature", temperature, (hidden.shape[0],), "one temperature a row of hidden")
    bad = torch.isfinite(temperature).logical_not() | (temperature <= 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"temperature[{row}]: expected a positive finite number, got {float(temperature[row])}")
    return temperature.to(hidden.device)


def _check_rows(rows: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Row indices as an int64 tensor."""
    tokens = hidden.shape[0]
    if not is_tensor(rows) or rows.is_floating_point() or rows.ndim != 1:
        raise TypeError(f"rows: expected a bool mask ({tokens},) or a 1-D tensor of row indices, got {describe(rows)}")
    rows = rows.to(hidden.device)
    if rows.dtype == torch.bool:
        check_shape("rows", rows, (tokens,), "one entry a row of hidden")
        return rows.nonzero().squeeze(1)
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= tokens):
        raise ValueError(f"rows: expected indices in 0..{tokens - 1}, got {int(rows.min())} .. {int(rows.max())}")
    return rows.long()


def _check_targets(targets: torch.Tensor, vocabulary: int, rows: torch.Tensor | None, leave: str = "rows=") -> None:
    outside = (targets < 0) | (targets >= vocabulary)
    if bool(outside.any()):
        position = int(outside.nonzero()[0, 0])
        row = position if rows is None else int(rows[position])
        raise ValueError(
            f"targets[{row}]: expected a token id in 0..{vocabulary - 1} (rows of weight), "
            f"got {int(targets[position])}; leave masked tokens out with {leave}"
        )


def _choose_implementation(impl: str | None, hidden: torch.Tensor, weight: torch.Tensor) -> str:
    if impl is None:
        return "triton" if hidden.is_cuda else "native"
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "native" and hidden.is_cuda:
        raise ValueError(f'impl: "native" is for tensors on a CPU, got hidden on {hidden.device}')
    if impl in ("triton", "persistent") and not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'impl: expected "native", "torch" or "reference" for tensors on a CPU, got "{impl}"')
    if impl == "persistent" and torch.float64 in (hidden.dtype, weight.dtype):
        raise ValueError('impl: "persistent" computes in float32, expected another one for float64 tensors')
    return impl


def _reference(hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, entropy: bool) -> TokenLogprobs:
    logprobs, entropies, lse = reference.token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature)
    double = torch.float64 in (hidden.dtype, weight.dtype)
    logprobs, entropies, lse = (x if double else x.float() for x in (logprobs, entropies, lse))
    return _result(logprobs, entropies if entropy else None, lse)
