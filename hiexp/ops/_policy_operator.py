"""The ``torch.library`` operators behind ``policy_loss``: loss and coefficients in one pass, backward is a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import _policy_terms
from hiexp.ops._policy_batch import Counts, Settings, TokenBatch, TokenInputs, pack, sequence_sums
from hiexp.ops._policy_terms import MAXIMA, SUMS

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.policy_loss")

Terms = Callable[[Any, TokenBatch, Settings], tuple[Any, Any]]

# The vector of metrics an operator returns: what was counted, then the statistics.
COUNTS = ("tokens", "sequences", "denominator")
METRICS = len(COUNTS) + len(SUMS) + len(MAXIMA)

INPUTS = (
    "Tensor? old, Tensor? ref, Tensor? engine, Tensor advantages, Tensor mask, Tensor cu_seqlens, "
    "Tensor? zero_variance, str[] names, float[] numbers, str impl"
)


def terms_of(impl: str) -> Terms:
    """The implementation of ``token_terms``."""
    if impl == "torch":
        return _policy_terms.token_terms
    require("triton", "gpu", 'hiexp.policy_loss(impl="triton")')
    from hiexp.kernels import policy_loss as kernels

    terms: Terms = kernels.token_terms
    return terms


def metrics_vector(counts: Counts, statistics: torch.Tensor) -> torch.Tensor:
    """(METRICS,) float64."""
    counted = [counts.lengths.sum().double(), (counts.lengths > 0).sum().double(), counts.divisor]
    return torch.cat([torch.stack(counted), statistics])


@torch.library.custom_op(
    "hiexp::policy_loss", mutates_args=(), schema=f"(Tensor logprobs, {INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def operator(logprobs: Any, *arguments: Any) -> tuple[Any, Any, Any]:
    """(loss, its gradient (N,), metrics (METRICS,)); types and shapes checked by ``policy_loss``."""
    *tensors, names, numbers, impl = arguments
    settings = Settings.of(names, numbers)
    batch, counts = pack(TokenInputs(*tensors), settings, logprobs.dtype)
    if settings.kind == "gspo" and batch.old is not None:
        difference = torch.where(batch.keep, logprobs - batch.old, 0.0)
        mean = sequence_sums(difference, tensors[5].long()) / counts.lengths.clamp(min=1)
        batch = replace(batch, sequence_log_ratio=mean[batch.sequence])
    coefficient, statistics = terms_of(impl)(logprobs.contiguous(), batch, settings)
    return statistics[0].to(logprobs.dtype), coefficient, metrics_vector(counts, statistics)


@operator.register_fake
def _operator_fake(logprobs: Any, *arguments: Any) -> tuple[Any, Any, Any]:
    metrics = logprobs.new_empty(METRICS, dtype=torch.float64)
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape), metrics


@torch.library.custom_op(
    "hiexp::policy_loss_backward", mutates_args=(), schema="(Tensor coefficient, Tensor upstream, str impl) -> Tensor"
)
def backward_operator(coefficient: Any, upstream: Any, impl: str) -> Any:
    """``coefficient`` (N,) times the 0-d ``upstream``, which is never read by the host."""
    if impl == "torch":
        return coefficient * upstream
    from hiexp.kernels import policy_loss as kernels

    return kernels.scale(coefficient, upstream)


@backward_operator.register_fake
def _backward_fake(coefficient: Any, upstream: Any, impl: str) -> Any:
    return torch.empty_like(coefficient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any]) -> None:
    ctx.impl = inputs[-1]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Any, *_: Any) -> tuple[Any, ...]:
    (coefficient,) = ctx.saved_tensors
    return backward_operator(coefficient, upstream.contiguous(), ctx.impl), *[None] * 10


operator.register_autograd(_backward, setup_context=_setup_context)
