"""The ``torch.library`` operators behind ``paired_logprobs``: autograd and torch.compile see one node each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import _logprob_pair, _logprob_pair_epilogue
from hiexp.ops._logprob_operator import make_problem
from hiexp.ops._logprob_pair import PairEpilogue, PairUpstream
from hiexp.ops._logprob_tiles import Problem

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.paired_logprobs")

_INPUTS = (
    "Tensor hidden_a, Tensor hidden_b, Tensor weight, Tensor? weight_b, Tensor targets, Tensor? bias, "
    "Tensor? temperature"
)


def _epilogue(impl: str) -> PairEpilogue:
    if impl == "torch":
        return PairEpilogue(_logprob_pair_epilogue.forward_tile, _logprob_pair_epilogue.backward_tile)
    require("triton", "gpu", 'hiexp.paired_logprobs(impl="triton")')
    from hiexp.kernels import logprob_pair

    return PairEpilogue(logprob_pair.forward_tile, logprob_pair.backward_tile)


def _problems(
    hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any, temperature: Any
) -> tuple[Problem, Problem]:
    return (
        make_problem(hidden_a, weight, targets, bias, temperature),
        make_problem(hidden_b, weight if weight_b is None else weight_b, targets, bias, temperature),
    )


@torch.library.custom_op(
    "hiexp::paired_logprobs",
    mutates_args=(),
    schema=f"({_INPUTS}, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def operator(
    hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any, temperature: Any, impl: str
) -> tuple[Any, Any, Any, Any, Any]:
    """(log-probs a, log-probs b, KL, log-sum-exp a, log-sum-exp b), (T,) each; arguments already checked."""
    with torch.autocast(hidden_a.device.type, enabled=False):
        a, b = _problems(hidden_a, hidden_b, weight, weight_b, targets, bias, temperature)
        return _logprob_pair.forward(a, b, _epilogue(impl))


@operator.register_fake
def _operator_fake(
    hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any, temperature: Any, impl: str
) -> tuple[Any, Any, Any, Any, Any]:
    kind = Problem(hidden_a, weight, targets, bias, None).accumulator
    row = hidden_a.new_empty(hidden_a.shape[0], dtype=kind)
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row), torch.empty_like(row)


@torch.library.custom_op(
    "hiexp::paired_logprobs_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor kl, Tensor lse_a, Tensor lse_b, Tensor grad_a, Tensor grad_b, Tensor grad_kl, "
    "Tensor grad_lse_a, Tensor grad_lse_b, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_operator(
    hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any, temperature: Any,
    kl: Any, lse_a: Any, lse_b: Any, grad_a: Any, grad_b: Any, grad_kl: Any, grad_lse_a: Any, grad_lse_b: Any,
    needs: Any, impl: str,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Gradients of hidden_a, hidden_b, weight, weight_b, bias; an empty tensor for each that is not asked for."""
    # A row without upstream gradient stays out even if its KL is NaN.
    through_kl = torch.where(grad_kl == 0, 0.0, grad_kl * kl)
    upstream = PairUpstream(
        lse_a=lse_a,
        lse_b=lse_b,
        target_a=grad_a,
        target_b=grad_b,
        constant_a=grad_lse_a - grad_a - through_kl,
        constant_b=grad_lse_b - grad_b + grad_kl,
        kl=grad_kl,
    )
    inputs = (hidden_a, hidden_b, weight, weight_b, bias)
    with torch.autocast(hidden_a.device.type, enabled=False):
        a, b = _problems(hidden_a, hidden_b, weight, weight_b, targets, bias, temperature)
        grads = _logprob_pair.backward(a, b, _epilogue(impl), upstream, tuple(needs))
    results = (grads.hidden_a, grads.hidden_b, grads.weight, grads.weight_b, grads.bias)
    return tuple(
        lse_a.new_empty(0) if grad is None else grad.to(x.dtype) for grad, x in zip(results, inputs, strict=True)
    )


@backward_operator.register_fake
def _backward_fake(
    hidden_a: Any, hidden_b: Any, weight: Any, weight_b: Any, targets: Any, bias: Any, temperature: Any,
    kl: Any, lse_a: Any, lse_b: Any, grad_a: Any, grad_b: Any, grad_kl: Any, grad_lse_a: Any, grad_lse_b: Any,
    needs: Any, impl: str,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    inputs = (hidden_a, hidden_b, weight, weight_b, bias)
    return tuple(torch.empty_like(x) if need else lse_a.new_empty(0) for x, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    needs = [bool(ctx.needs_input_grad[position]) for position in (0, 1, 2, 3, 5)]
    results = backward_operator(*ctx.saved_tensors, *(grad.contiguous() for grad in grads), needs, ctx.impl)
    hidden_a, hidden_b, weight, weight_b, bias = (g if need else None for g, need in zip(results, needs, strict=True))
    return hidden_a, hidden_b, weight, weight_b, None, bias, None, None


operator.register_autograd(_backward, setup_context=_setup_context)
