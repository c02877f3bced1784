"""Policy loss straight from hidden states: log-probs, loss and all gradients in three matrix products, no logits kept.

``policy_loss(token_logprobs(...))`` computes the logits again in its backward pass, four products in all. Here the
gradient is formed in the forward pass, where the logits are, and backward only multiplies it by the upstream scalar.
See _policy_linear.py for the algorithm and policy_loss.py for the losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops import _policy_linear
from hiexp.ops._logprob_tiles import Problem
from hiexp.ops._policy_batch import Settings, TokenInputs, check_settings, check_tokens, pack
from hiexp.ops._policy_operator import INPUTS, METRICS, metrics_vector, terms_of
from hiexp.ops._policy_rows import rows_of
from hiexp.ops.policy_loss import PolicyLoss, choose_implementation, optional_metrics
from hiexp.ops.token_logprobs import _check_targets, _check_temperature, _check_tensors

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.linear_policy_loss")


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ref_logprobs: torch.Tensor | None = None,
    kind: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    clip_dual: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str | None = None,
    engine_logprobs: torch.Tensor | None = None,
    truncation: float | None = None,
    constant_length: int | None = None,
    zero_variance: torch.Tensor | None = None,
    denominator: float | None = None,
    entropy: bool = False,
    impl: str | None = None,
) -> PolicyLoss:
    """Equals ``policy_loss(token_logprobs(hidden, weight, targets, ...).logprobs, old_logprobs, ...)``.

    N tokens, S sequences, H hidden size, V vocabulary. The loss arguments are those of :func:`hiexp.policy_loss`.

    Args:
        hidden: (N, H) final hidden states; row n predicts ``targets[n]``.
        weight: (V, H) LM head; may be frozen (then its gradient costs nothing), tied, or of another dtype.
        targets: (N,) integer token ids; masked entries are not looked at, they may hold padding such as -100.
        old_logprobs: (N,) or None, the policy itself.
        mask: (N,) nonzero on tokens that count. The others enter no product, whatever their hidden states hold.
        bias: (V,) or None. Entries of -inf are allowed (forbidden tokens).
        temperature: positive number, or (N,) tensor with one a row.
        entropy: report the mean ``entropy`` in the metrics; it has no gradient.

    Returns:
        PolicyLoss with gradients to ``hidden``, ``weight`` and ``bias``. They are computed in this call and held until
        backward; under ``torch.no_grad()`` only the loss is computed.

    Half-precision inputs are accumulated in float32. At most 256 MB of logits are alive on a CPU, at most 2 GB in
    float32 on a GPU.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, offsets, names or numbers, or a target outside the
            vocabulary (the row is named).
    """
    settings = check_settings(
        kind, clip_low, clip_high, clip_dual, kl_coef, kl_estimator, truncation, aggregation, constant_length,
        denominator, ref=ref_logprobs, engine=engine_logprobs,
    )  # fmt: skip
    _check_tensors(hidden, weight, targets, bias)
    temperature = _check_temperature(temperature, hidden)
    inputs = check_tokens(
        hidden.shape[0], hidden.device, Problem(hidden, weight, targets, bias, None).accumulator,
        {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "engine_logprobs": engine_logprobs},
        advantages, mask, cu_seqlens, zero_variance,
    )  # fmt: skip
    impl = choose_implementation(impl, weight if weight.dtype == torch.float64 else hidden)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, values, *_, logprobs = operator(
        hidden, weight, targets, bias, temperature, *inputs.flat(), *settings.flat(), impl, entropy, needs
    )
    optional = optional_metrics(settings, ref_logprobs, engine_logprobs, entropy)
    return PolicyLoss(loss, values.detach(), optional, logprobs.detach())


@torch.library.custom_op(
    "hiexp::linear_policy_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperature, {INPUTS}, bool entropy, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def operator(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, *arguments: Any
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """(loss, metrics, gradients of hidden, weight and bias, empty where ``needs`` says no, log-probs (N,))."""
    *tensors, names, numbers, impl, entropy, needs = arguments
    settings = Settings.of(names, numbers)
    whole = Problem(hidden, weight, targets, bias, None)
    batch, counts = pack(TokenInputs(*tensors), settings, whole.accumulator)
    rows = batch.keep.nonzero().squeeze(1)
    inverse = None if temperature is None else temperature.to(whole.accumulator).reciprocal()
    problem = Problem(hidden, weight, targets.long(), bias, inverse)
    if len(rows) < len(batch.keep):
        problem, batch = problem.select(rows), batch.of(rows)
    _check_targets(problem.targets, weight.shape[0], rows, "mask=")
    # Under autocast the inner products would silently drop to half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        outcome = _policy_linear.run(
            problem, batch, counts.lengths, settings, terms_of(impl), rows_of(impl), entropy=entropy,
            needs=tuple(needs),
        )  # fmt: skip
    metrics = torch.cat([metrics_vector(counts, outcome.statistics), outcome.entropy.double().sum()[None]])
    gradients = _as_inputs(outcome, hidden, weight, bias, rows)
    logprobs = outcome.logprobs
    if len(rows) < hidden.shape[0]:
        logprobs = logprobs.new_zeros(hidden.shape[0]).index_copy_(0, rows, logprobs)
    return outcome.statistics[0].to(whole.accumulator), metrics, *gradients, logprobs


def _as_inputs(outcome: Any, hidden: Any, weight: Any, bias: Any, rows: Any) -> tuple[Any, Any, Any]:
    """Gradients in the shape of the inputs; outputs of an operator may not be one tensor, not even empty."""
    grads = outcome.gradients
    results = [
        outcome.statistics.new_empty(0) if grad is None else grad.to(_held(like.dtype))
        for grad, like in ((grads.hidden, hidden), (grads.weight, weight), (grads.bias, bias))
    ]
    if grads.hidden is not None and len(rows) < hidden.shape[0]:
        results[0] = torch.zeros_like(hidden, dtype=results[0].dtype).index_copy_(0, rows, results[0])
    return results[0], results[1], results[2]


def _held(dtype: Any) -> Any:
    """What a gradient is held in until backward: float16 would underflow before a loss scaler's factor arrives."""
    return torch.float32 if dtype == torch.float16 else dtype


@operator.register_fake
def _operator_fake(hidden: Any, weight: Any, targets: Any, bias: Any, *arguments: Any) -> tuple[Any, ...]:
    accumulator = Problem(hidden, weight, targets, bias, None).accumulator
    metrics = hidden.new_empty(METRICS + 1, dtype=torch.float64)
    grads = [
        x.new_empty(x.shape, dtype=_held(x.dtype)) if need else metrics.new_empty(0)
        for x, need in zip((hidden, weight, bias), arguments[-1], strict=True)
    ]
    logprobs = hidden.new_empty(hidden.shape[:1], dtype=accumulator)
    return hidden.new_empty((), dtype=accumulator), metrics, *grads, logprobs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.needs, ctx.inputs = inputs[-1], len(inputs)
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.save_for_backward(*output[2:5])


def _backward(ctx: Any, upstream: Any, *_: Any) -> tuple[Any, ...]:
    hidden, weight, bias = (
        (grad * upstream).to(dtype) if need else None
        for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return hidden, weight, None, bias, *[None] * (ctx.inputs - 4)


operator.register_autograd(_backward, setup_context=_setup_context)
