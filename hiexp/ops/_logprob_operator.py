"""The ``torch.library`` operators behind ``token_logprobs``: autograd and torch.compile see one node each way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import _logprob_epilogue, _logprob_native, _logprob_tiles
from hiexp.ops._logprob_tiles import Epilogue, Problem, Upstream

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.token_logprobs")


def _epilogue(impl: str) -> Epilogue:
    if impl == "native":
        return Epilogue(_logprob_native.forward_tile, _logprob_native.backward_tile, keeps=True)
    if impl == "torch":
        return Epilogue(_logprob_epilogue.forward_tile, _logprob_epilogue.backward_tile)
    require("triton", "gpu", 'hiexp.token_logprobs(impl="triton")')
    from hiexp.kernels import logprob_epilogue

    return Epilogue(logprob_epilogue.forward_tile, logprob_epilogue.backward_tile)


def _persistent(problem: Problem, entropy: bool) -> tuple[Any, Any, Any]:
    require("triton", "gpu", 'hiexp.token_logprobs(impl="persistent")')
    from hiexp.kernels import logprob_persistent

    operands = (x.to(problem.operand) for x in (problem.hidden, problem.weight))
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in operands)
    targets, bias, inverse = problem.targets.contiguous(), problem.bias, problem.inverse_temperature
    logprobs, entropies, lse = logprob_persistent.forward(hidden, weight, targets, bias, inverse, entropy=entropy)
    return logprobs, entropies, lse


def make_problem(hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any) -> Problem:
    """The checked arguments; ``temperature`` (T,) or None."""
    problem = Problem(hidden, weight, targets, bias, None)
    if temperature is None:
        return problem
    return Problem(hidden, weight, targets, bias, temperature.to(problem.accumulator).reciprocal())


@torch.library.custom_op(
    "hiexp::token_logprobs",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperature, bool entropy, str impl, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def operator(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, entropy: bool, impl: str, keep: bool
) -> tuple[Any, Any, Any, Any]:
    """(log-probs, entropy or an empty tensor, log-sum-exp), (T,) each; arguments checked by ``token_logprobs``.

    ``keep``: a backward pass will follow, so logits may be kept for it, where the epilogue can; the last result.
    """
    # Under autocast the inner products would silently drop to half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        problem, epilogue = make_problem(hidden, weight, targets, bias, temperature), _epilogue(impl)
        if impl == "persistent":
            results = _persistent(problem, entropy)
            return *results, results[0].new_empty(0)
        wanted = len(hidden) * len(weight) if keep and epilogue.keeps else 0
        kept = _logprob_native.kept_buffer(wanted, problem.accumulator) if wanted else None
        results = _logprob_tiles.forward(problem, epilogue, entropy=entropy, kept=kept)
    return *results, results[0].new_empty(0) if kept is None else kept


@operator.register_fake
def _operator_fake(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, entropy: bool, impl: str, keep: bool
) -> tuple[Any, Any, Any, Any]:
    row = hidden.new_empty(hidden.shape[0], dtype=Problem(hidden, weight, targets, bias, None).accumulator)
    return row, torch.empty_like(row) if entropy else row.new_empty(0), torch.empty_like(row), row.new_empty(0)


@torch.library.custom_op(
    "hiexp::token_logprobs_backward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperature, Tensor lse, "
    "Tensor entropy, Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_lse, bool[] needs, str impl, Tensor kept)"
    " -> (Tensor, Tensor, Tensor)",
)
def backward_operator(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, lse: Any, entropy: Any,
    grad_logprobs: Any, grad_entropy: Any, grad_lse: Any, needs: Any, impl: str, kept: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Gradients of hidden, weight and bias; an empty tensor for each that ``needs`` says no to."""
    problem = make_problem(hidden, weight, targets, bias, temperature)
    constant = grad_lse - grad_logprobs
    # entropy = lse - sum p z, so d entropy / dz_v = -p_v (z_v - lse + entropy)
    with_entropy = grad_entropy.numel() > 0 and bool(grad_entropy.any())
    # A row without upstream gradient stays out even if its entropy is NaN.
    through_entropy = torch.where(grad_entropy == 0, 0.0, grad_entropy * entropy) if with_entropy else 0.0
    upstream = Upstream(
        target=grad_logprobs,
        constant=constant - through_entropy,
        entropy=grad_entropy if with_entropy else None,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        grads = _logprob_tiles.backward(problem, _epilogue(impl), lse, upstream, tuple(needs), kept)
    return grads[0].to(hidden.dtype), grads[1], grads[2]


@backward_operator.register_fake
def _backward_fake(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, lse: Any, entropy: Any,
    grad_logprobs: Any, grad_entropy: Any, grad_lse: Any, needs: Any, impl: str, kept: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    inputs = (hidden, weight, bias)
    grads = [torch.empty_like(x) if need else lse.new_empty(0) for x, need in zip(inputs, needs, strict=True)]
    return (grads[0] if needs[0] else hidden.new_empty(0)), grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any, Any]) -> None:
    hidden, weight, targets, bias, temperature, _, ctx.impl, _ = inputs
    _, entropy, lse, kept = output
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, lse, entropy, kept)
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # a gradient for ``kept`` would be as large as itself


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    needs = [bool(ctx.needs_input_grad[position]) for position in (0, 1, 3)]
    *saved, lse, entropy, kept = ctx.saved_tensors
    rows = [
        torch.zeros_like(output) if grad is None else grad.contiguous()
        for grad, output in zip(grads[:3], (lse, entropy, lse), strict=True)
    ]
    results = backward_operator(*saved, lse, entropy, *rows, needs, ctx.impl, kept)
    hidden, weight, bias = (grad if need else None for grad, need in zip(results, needs, strict=True))
    return hidden, weight, None, bias, None, None, None, None


operator.register_autograd(_backward, setup_context=_setup_context)
