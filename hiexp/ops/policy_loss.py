"""Policy-gradient losses over packed tokens: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, with KL penalty and rollout correction.

For a token t of rollout i, with ratio r = exp(logprob - old_logprob) and advantage A:

    grpo, dr_grpo, dapo   -min(r A, clip(r, 1 - low, 1 + high) A)        arXiv:2402.03300, 2503.20783, 2503.14476
    gspo                  the same, r the geometric mean of the sequence's token ratios          arXiv:2507.18071
    cispo                 -stop_gradient(clip(r, 1 - low, 1 + high)) A logprob                   arXiv:2506.13585

times min(exp(old_logprob - engine_logprob), truncation) where the rollout engine's own log-probs are given, plus
``kl_coef`` times an estimate of KL(policy || reference). What else differs between the methods is the aggregation.

Where this differs from others, on purpose (tests/ops/test_policy_loss_parity.py shows each):
    verl   bounds its k3 estimate to [-10, 10], GSPO's log ratio to at most 10, and clips negative advantages at a ratio
           of 3 unless told otherwise; here k3 is bounded through its exponent only, log ratios to [-20, 20], and
           ``clip_dual`` is off.
    TRL    averages over all sequences, those without a trained token included (pass ``denominator``); its CISPO has an
           upper bound only, given as the bound itself (``clip_low=1``, ``clip_high=epsilon_high - 1``); with GSPO and
           importance weights that differ within a sequence it gives every token the sequence's mean weight.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._checks import check_choice, describe, is_tensor
from hiexp.ops._policy_batch import Settings, check_precision, check_settings, check_tokens
from hiexp.ops._policy_operator import COUNTS, operator
from hiexp.ops._policy_terms import MAXIMA, SUMS

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.policy_loss")


@dataclass(frozen=True)
class PolicyLoss:
    """Result of :func:`policy_loss` and ``linear_policy_loss``.

    Attributes:
        loss: scalar tensor, with gradient.
        values: what :attr:`metrics` is read from, still on the device.
        optional: which optional metrics there are.
        logprobs: (N,) log-probs of the policy without gradient; tokens that do not count hold no meaning.
    """

    loss: torch.Tensor
    values: torch.Tensor
    optional: frozenset[str]
    logprobs: torch.Tensor

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Floats over the tokens that count. The first look copies them to the host and so waits for the GPU.

        ``tokens``, ``sequences``, ``denominator`` (what the loss was divided by), ``ratio_mean``, ``ratio_max``,
        ``approx_kl`` (k3 estimate of KL(old || policy)), ``clip_fraction`` and its parts ``clip_fraction_low`` and
        ``clip_fraction_high``, ``nonfinite_tokens`` (tokens with a NaN or infinite log-prob or advantage: the loss is
        not to be trusted unless this is 0); with ``clip_dual`` ``clip_fraction_dual``, a part of ``clip_fraction``;
        with ``ref_logprobs`` ``kl_ref``; with ``engine_logprobs`` ``importance_mean``, ``importance_max``,
        ``truncated_fraction``, ``engine_kl`` (k3 estimate of KL(engine || old)) and ``engine_gap`` (mean of |old -
        engine|); ``entropy`` where ``linear_policy_loss`` was asked for it.
        """
        found = self.values.tolist()
        first = len(COUNTS)
        metrics = dict(zip(COUNTS, found, strict=False))
        sums = dict(zip(SUMS, found[first:], strict=False))
        maxima = dict(zip(MAXIMA, found[first + len(SUMS) :], strict=False))
        mean = {name: total / max(metrics["tokens"], 1.0) for name, total in sums.items()}
        metrics |= {
            "ratio_mean": mean["ratio"],
            "ratio_max": maxima["ratio"],
            "approx_kl": mean["approx_kl"],
            "clip_fraction": mean["clip_low"] + mean["clip_high"] + mean["clip_dual"],
            "clip_fraction_low": mean["clip_low"],
            "clip_fraction_high": mean["clip_high"],
            "nonfinite_tokens": sums["nonfinite"],
        }
        if "dual" in self.optional:
            metrics["clip_fraction_dual"] = mean["clip_dual"]
        if "ref" in self.optional:
            metrics["kl_ref"] = mean["kl_ref"]
        if "engine" in self.optional:
            metrics |= {
                "importance_mean": mean["importance"],
                "importance_max": maxima["importance"],
                "truncated_fraction": mean["truncated"],
                "engine_kl": mean["engine_kl"],
                "engine_gap": mean["engine_gap"],
            }
        if "entropy" in self.optional:
            metrics["entropy"] = found[-1] / max(metrics["tokens"], 1.0)
        return metrics


def optional_metrics(settings: Settings, ref: Any, engine: Any, entropy: bool = False) -> frozenset[str]:
    """Names for ``PolicyLoss.optional``."""
    given = {"dual": settings.dual < float("inf"), "ref": ref is not None, "engine": engine is not None}
    return frozenset(name for name, there in (given | {"entropy": entropy}).items() if there)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
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
    impl: str | None = None,
) -> PolicyLoss:
    """Loss of packed rollouts; N tokens, S sequences.

    Args:
        logprobs: (N,) float32 or float64 log-probs of the policy being trained, with gradient.
        old_logprobs: (N,) log-probs of the policy that is the denominator of the ratio, without gradient. None: the
            policy is still the one that acted, every ratio is 1 and the gradient is the plain policy gradient.
        advantages: (S,) one a sequence, or (N,) one a token; (S,) is meant where S == N.
        mask: (N,) nonzero exactly on sampled tokens; all others count nowhere and may hold anything, NaN included.
        cu_seqlens: (S + 1,) integer cumulative lengths of the sequences.
        ref_logprobs: (N,) log-probs of the frozen reference. With ``kl_coef`` 0 the KL is only reported.
        kind: ``"grpo"``, ``"dr_grpo"``, ``"dapo"``, ``"gspo"`` or ``"cispo"``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; ``clip_high`` None means 0.28 for
            dapo ("clip higher") and ``clip_low`` for the others.
        clip_dual: where the advantage is negative the ratio is bounded by this, above 1; 3 is usual (dual clip,
            arXiv:1912.09729). Not for cispo.
        kl_coef: weight of the KL term. It is added per token, before the aggregation.
        kl_estimator: with d = logprob - ref_logprob, ``"k1"``: d, ``"k2"``: d^2 / 2, ``"k3"``: exp(-d) + d - 1.
        aggregation: ``"token"``: mean over tokens; ``"sequence"``: mean over sequences of their token means;
            ``"constant"``: sum over tokens / (sequences * ``constant_length``). None: see DEFAULT_AGGREGATION.
        engine_logprobs: (N,) log-probs the rollout engine reported; without ``truncation`` they change metrics only.
        truncation: cap of the importance weight exp(old - engine); 2 is usual.
        constant_length: tokens, e.g. the longest allowed response; needed by and only for ``"constant"``.
        zero_variance: (S,) bool, sequences to leave out of everything, the KL term and the denominator included
            (``group_advantage(...).zero_variance``).
        denominator: divide by this instead of by the tokens (``"token"``) or sequences (the others) counted here. For
            micro-batches: pass the count of the whole batch, then the gradients of the micro-batches simply add up.
        impl: None picks by device and type: ``"triton"`` (float32 only) on a GPU, ``"torch"`` otherwise.

    Returns:
        PolicyLoss. With no token left the loss is 0, its gradient is 0 everywhere, and all metrics are 0. Half
        precision becomes float32.

    Raises:
        TypeError, ValueError: wrong types, shapes, offsets, names or numbers.
    """
    settings = check_settings(
        kind, clip_low, clip_high, clip_dual, kl_coef, kl_estimator, truncation, aggregation, constant_length,
        denominator, ref=ref_logprobs, engine=engine_logprobs,
    )  # fmt: skip
    if not is_tensor(logprobs) or not logprobs.is_floating_point():
        raise TypeError(f"logprobs: expected a floating point torch tensor (N,), got {describe(logprobs)}")
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs: expected a 1-D tensor of packed tokens, got {describe(logprobs)}")
    check_precision("logprobs", logprobs)
    inputs = check_tokens(
        logprobs.shape[0], logprobs.device, logprobs.dtype,
        {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "engine_logprobs": engine_logprobs},
        advantages, mask, cu_seqlens, zero_variance,
    )  # fmt: skip
    impl = choose_implementation(impl, logprobs)
    loss, _, values = operator(logprobs, *inputs.flat(), *settings.flat(), impl)
    optional = optional_metrics(settings, ref_logprobs, engine_logprobs)
    return PolicyLoss(loss, values.detach(), optional, logprobs.detach())


def choose_implementation(impl: str | None, values: torch.Tensor) -> str:
    """``impl`` or what suits the device and dtype of ``values``, the log-probs or what they are computed from."""
    double = values.dtype == torch.float64
    if impl is None:
        return "triton" if values.is_cuda and not double else "torch"
    check_choice("impl", impl, ("torch", "triton"))
    if impl == "triton" and double:
        raise ValueError('impl: expected "torch" for float64 tensors, got "triton"')
    if impl == "triton" and not values.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('impl: expected "torch" for tensors on a CPU, got "triton"')
    return impl
