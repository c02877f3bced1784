"""The packed batch behind ``policy_loss`` and ``linear_policy_loss``: argument checks, what counts, with what weight.

Only shapes and types are looked at before the operators run, so that torch.compile can trace a call; what depends on
values (offsets) is checked inside them, by :func:`pack`. Symbols: N tokens, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._checks import check_choice, check_number, check_offsets, check_shape, describe, is_tensor

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.policy_loss")

# How each method turns token losses into one number, unless told otherwise: grpo and gspo average each sequence first,
# dapo and cispo count every token alike, dr_grpo divides by a constant so that no length is favoured.
DEFAULT_AGGREGATION = {
    "grpo": "sequence",
    "dr_grpo": "constant",
    "dapo": "token",
    "gspo": "sequence",
    "cispo": "token",
}
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Settings:
    """Checked numbers and names of one loss. ``inf`` and 0 stand for "none" as the comments say."""

    kind: str
    kl_estimator: str
    aggregation: str
    low: float  # bounds of the ratio: 1 - clip_low, 1 + clip_high
    high: float
    dual: float  # inf: no bound for negative advantages
    kl_coef: float
    truncation: float  # 0: importance weights are reported, not applied
    constant_length: float
    denominator: float  # 0: count

    def flat(self) -> tuple[list[str], list[float]]:
        """Names and numbers, as an operator's schema can take them."""
        values = astuple(self)
        return list(values[:3]), list(values[3:])

    @staticmethod
    def of(names: list[str], numbers: list[float]) -> Settings:
        """The inverse of :meth:`flat`."""
        kind, kl_estimator, aggregation = names
        return Settings(kind, kl_estimator, aggregation, *numbers)


def check_settings(
    kind: str, clip_low: Any, clip_high: Any, clip_dual: Any, kl_coef: Any, kl_estimator: str, truncation: Any,
    aggregation: str | None, constant_length: Any, denominator: Any, *, ref: Any, engine: Any,
) -> Settings:  # fmt: skip
    """Names and numbers of the public arguments; ``ref`` and ``engine`` only for being there where they must be."""
    check_choice("kind", kind, tuple(DEFAULT_AGGREGATION))
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    aggregation = DEFAULT_AGGREGATION[kind] if aggregation is None else aggregation
    check_choice("aggregation", aggregation, ("token", "sequence", "constant"))
    low = check_number("clip_low", clip_low, 0.0)
    if clip_high is None:
        clip_high = 0.28 if kind == "dapo" else low
    high = check_number("clip_high", clip_high, 0.0)
    if clip_dual is not None:
        check_number("clip_dual", clip_dual, 1.0, exclusive=True)
        if kind == "cispo":
            raise ValueError(f"clip_dual: expected None with kind 'cispo', which keeps every gradient, got {clip_dual}")
    kl_coef = check_number("kl_coef", kl_coef, 0.0)
    if kl_coef > 0 and ref is None:
        raise ValueError(f"ref_logprobs: expected a tensor (N,) because kl_coef is {kl_coef}, got None")
    if truncation is not None:
        check_number("truncation", truncation, 0.0, exclusive=True)
        if engine is None:
            raise ValueError(f"engine_logprobs: expected a tensor (N,) because truncation is {truncation}, got None")
    if (aggregation == "constant") != (constant_length is not None):
        raise ValueError(
            'constant_length: expected a number of tokens with aggregation "constant" (the default of dr_grpo) and '
            f"None otherwise, got {constant_length!r} with {aggregation!r}"
        )
    for name, value in (("constant_length", constant_length), ("denominator", denominator)):
        if value is not None:
            check_number(name, value, 0.0, exclusive=True)
    return Settings(
        kind, kl_estimator, aggregation, 1.0 - low, 1.0 + high, math.inf if clip_dual is None else float(clip_dual),
        kl_coef, float(truncation or 0.0), float(constant_length or 0.0), float(denominator or 0.0),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenInputs:
    """Checked tensors of one call: (N,) each, ``advantages`` (N,) or (S,), ``zero_variance`` (S,)."""

    old: torch.Tensor | None
    ref: torch.Tensor | None
    engine: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor
    cu_seqlens: torch.Tensor
    zero_variance: torch.Tensor | None

    def flat(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the fields, as the operators take them."""
        return (
            self.old, self.ref, self.engine, self.advantages, self.mask, self.cu_seqlens, self.zero_variance,
        )  # fmt: skip


def check_precision(name: str, value: torch.Tensor) -> None:
    """Half precision is off by up to 0.03 nat, which the ratio exp(new - old) turns into several percent."""
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float32 or float64 log-probs, got {describe(value)}; half precision has too few digits, "
            "use .float() if nothing better is to be had"
        )


def check_device(name: str, value: Any, device: Any) -> None:
    if is_tensor(value) and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where logprobs are, got one on {value.device}")


def check_tokens(
    tokens: int, device: Any, dtype: Any, per_token: dict[str, Any],
    advantages: Any, mask: Any, cu_seqlens: Any, zero_variance: Any,
) -> TokenInputs:  # fmt: skip
    """``per_token``: old_logprobs, ref_logprobs, engine_logprobs, each None or a floating point tensor (N,)."""
    for name, value in per_token.items():
        if value is None:
            continue
        if not is_tensor(value) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating point torch tensor (N,) or None, got {describe(value)}")
        check_precision(name, value)
        check_shape(name, value, (tokens,), "one entry a token")
        check_device(name, value, device)
    check_device("mask", mask, device)
    check_device("advantages", advantages, device)
    old, ref, engine = (None if x is None else x.detach().to(device, dtype).contiguous() for x in per_token.values())
    mask, cu_seqlens = torch.as_tensor(mask, device=device), torch.as_tensor(cu_seqlens, device=device)
    check_shape("mask", mask, (tokens,), "one entry a token")
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens: expected a 1-D integer array of cumulative lengths, got {describe(cu_seqlens)}")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: expected at least 1 offset (sequences + 1), got none")
    sequences = cu_seqlens.shape[0] - 1
    if zero_variance is not None:
        zero_variance = torch.as_tensor(zero_variance, device=device)
        if zero_variance.dtype != torch.bool:
            raise TypeError(f"zero_variance: expected a bool tensor (S,), got {describe(zero_variance)}")
        check_shape("zero_variance", zero_variance, (sequences,), "one entry a sequence")
    advantages = torch.as_tensor(advantages, device=device).detach().to(dtype)
    if tuple(advantages.shape) not in ((sequences,), (tokens,)):
        raise ValueError(
            f"advantages: expected shape ({sequences},), one a sequence, or ({tokens},), one a token; "
            f"got {tuple(advantages.shape)}"
        )
    return TokenInputs(old, ref, engine, advantages, mask, cu_seqlens, zero_variance)


@dataclass(frozen=True)
class TokenBatch:
    """What the loss of a token depends on besides its log-prob, (N,) each; 0 where ``keep`` is false.

    Attributes:
        keep: bool, the tokens that count.
        scale: weight of the token's loss in the sum that is the loss.
        sequence: int64, which sequence.
        sequence_log_ratio: the sequence's mean log ratio, for gspo only.
    """

    keep: torch.Tensor
    scale: torch.Tensor
    advantage: torch.Tensor
    sequence: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor | None
    engine: torch.Tensor | None
    sequence_log_ratio: torch.Tensor | None = None

    def of(self, rows: torch.Tensor | slice) -> TokenBatch:
        """The tokens ``rows`` of it."""
        fields = (self.keep, self.scale, self.advantage, self.sequence, self.old, self.ref, self.engine,
                  self.sequence_log_ratio)  # fmt: skip
        return TokenBatch(*(None if field is None else field[rows] for field in fields))


@dataclass(frozen=True)
class Counts:
    """``lengths`` (S,) int64, tokens that count in each sequence; ``divisor`` 0-d float64."""

    lengths: torch.Tensor
    divisor: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """(S + 1,) cumulative lengths of the tokens that count."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))


def pack(inputs: TokenInputs, settings: Settings, dtype: Any) -> tuple[TokenBatch, Counts]:
    """Combine mask, sequences and aggregation into one weight a token.

    Raises:
        ValueError: offsets that do not start at 0, fall, or do not end at N.
    """
    tokens, sequences = inputs.mask.shape[0], inputs.cu_seqlens.shape[0] - 1
    check_offsets("cu_seqlens", inputs.cu_seqlens, None, tokens)
    offsets = inputs.cu_seqlens.long()
    ids = torch.arange(sequences, device=offsets.device)
    sequence = ids.repeat_interleave(offsets[1:] - offsets[:-1], output_size=tokens)
    keep = inputs.mask != 0
    if inputs.zero_variance is not None:
        keep = keep & ~inputs.zero_variance[sequence]
    # Differences of a running count are exact and always the same; adding floats by index is neither on a GPU.
    lengths = torch.nn.functional.pad(keep.long().cumsum(0), (1, 0))[offsets].diff()
    count = lengths.sum() if settings.aggregation == "token" else (lengths > 0).sum()
    # With nothing to count the total is 0: dividing it by 1 keeps loss and gradient 0 instead of 0 / 0.
    divisor = count.clamp(min=1).double() if not settings.denominator else count.double() * 0 + settings.denominator
    scale = divisor.reciprocal().expand(sequences)
    if settings.aggregation == "sequence":
        scale = scale / lengths.clamp(min=1)
    elif settings.aggregation == "constant":
        scale = scale / settings.constant_length
    by_sequence = inputs.advantages.shape[0] == sequences
    advantage = inputs.advantages[sequence] if by_sequence else inputs.advantages
    old, ref, engine = (
        None if x is None else torch.where(keep, x, 0.0) for x in (inputs.old, inputs.ref, inputs.engine)
    )
    scale = torch.where(keep, scale.to(dtype)[sequence], 0.0)
    return TokenBatch(keep, scale, torch.where(keep, advantage, 0.0), sequence, old, ref, engine), Counts(
        lengths, divisor
    )


def sequence_sums(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(S,) sums of (N,) values between offsets (S + 1,), always added in the same order."""
    if values.shape[0] == 0:
        return values.new_zeros(offsets.shape[0] - 1)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)
