"""Group-relative advantages by every stack's conventions; ragged groups, any labels, stated policies for odd groups.

    A_i = (r_i - b_i) / (s + eps)      GRPO, arXiv:2402.03300, eq. 4

C++ for numpy arrays and torch tensors on the CPU, one CUDA launch for tensors on a GPU; neither copies its inputs. The
presets give the numbers of verl, TRL, OpenRLHF, slime and prime-rl. ``csrc/advantage/formula.h`` holds the formulas:
the result does not depend on the order of rows, and CPU and GPU give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from hiexp.ops._checks import check_choice, check_number, describe, is_tensor
from hiexp.ops._group_advantage_inputs import as_labels, as_rewards, as_tokens
from hiexp.ops._group_advantage_launch import launch_numpy

_GRPO = {"baseline": "mean", "scale": "std", "ddof": 1, "eps": 1e-6, "singleton": "zero"}
_MEAN_ONLY = {**_GRPO, "scale": "none"}

# What each stack computes; an argument given explicitly wins over its preset.
PRESETS: dict[str, dict[str, Any]] = {
    "verl": {**_GRPO, "singleton": "raw"},
    "trl": {**_GRPO, "eps": 1e-4},
    "trl_async": {**_GRPO, "ddof": 0, "eps": 1e-8},
    "openrlhf": {**_GRPO, "eps": 1e-9},
    "slime": _GRPO,
    "prime_rl": _MEAN_ONLY,
    "dr_grpo": _MEAN_ONLY,  # arXiv:2503.20783: no division by the standard deviation
    "rloo": {**_MEAN_ONLY, "baseline": "leave_one_out"},  # arXiv:2402.14740
}


@dataclass(frozen=True)
class GroupAdvantage:
    """Result of :func:`group_advantage`; arrays live where the rewards lived.

    The four arrays per group are gathered when first asked for. On a GPU that waits for the device; the others do not.

    Attributes:
        advantages: (N,), float32 or float64 like the rewards (float32 for half precision; integer rewards become
            float64 in numpy, float32 in torch).
        zero_variance: (N,) bool, rows without a learning signal: all rewards of the group are equal (a singleton
            included, unless ``singleton="raw"``), or the row's reward was not finite. ``policy_loss`` leaves them out.
        token_advantages: (N, T) for a padded ``token_mask``, (tokens,) for ``cu_seqlens``, None if neither was given.
        non_finite_row: 0-d int64, the first row whose reward was not finite, -1 if there was none.
        mean, std: (G,) per group, over its finite rewards, groups in ascending order of their label; ``std`` uses
            ``ddof`` and is 0 where the group is too small for it.
        counts: (G,) int64, finite rewards of each group.
        groups: (G,) int64, the labels the three arrays above are ordered by.
    """

    advantages: Any
    zero_variance: Any
    token_advantages: Any | None
    non_finite_row: Any
    # (N,) each: the statistics of a group stand at its first row, where the count is not -1.
    _labels: Any = field(repr=False)
    _mean: Any = field(repr=False)
    _std: Any = field(repr=False)
    _counts: Any = field(repr=False)

    @cached_property
    def _first_rows(self) -> Any:
        """(G,) first row of each group, in ascending order of the labels."""
        if is_tensor(self._counts):
            rows = (self._counts >= 0).nonzero().squeeze(1)
            return rows[self._labels[rows].argsort()]
        rows = np.flatnonzero(self._counts >= 0)
        return rows[self._labels[rows].argsort()]

    @property
    def mean(self) -> Any:
        return self._mean[self._first_rows]

    @property
    def std(self) -> Any:
        return self._std[self._first_rows]

    @property
    def counts(self) -> Any:
        counts = self._counts[self._first_rows]
        return counts.long() if is_tensor(counts) else counts.astype(np.int64)

    @property
    def groups(self) -> Any:
        labels = self._labels[self._first_rows]
        return labels.long() if is_tensor(labels) else labels.astype(np.int64)


def group_advantage(
    rewards: Any,
    group_ids: Any,
    *,
    baseline: str | None = None,
    scale: str | None = None,
    ddof: int | None = None,
    eps: float | None = None,
    singleton: str | None = None,
    preset: str | None = None,
    nan: str = "raise",
    token_mask: Any | None = None,
    cu_seqlens: Any | None = None,
) -> GroupAdvantage:
    """Advantage of each rollout relative to its group.

    Args:
        rewards: (N,) one reward a rollout; numpy, torch, or anything with ``__dlpack__``. No gradient flows through.
        group_ids: (N,) integer labels, equal for rollouts of one question: any values, any order, groups of any size.
        baseline: ``"mean"`` (default), ``"leave_one_out"`` (mean of the other members) or ``"none"``.
        scale: divide by the standard deviation of the group, ``"std"`` (default), of all rewards, ``"batch"``, or
            ``"none"``. Where that deviation is 0 the advantage is 0.
        ddof: divisor of the variance is count - ddof; 1 by default, or 0.
        eps: added to the standard deviation; 1e-6 by default.
        singleton: advantage of a group of one: ``"zero"`` (default) or ``"raw"``, its reward.
        preset: defaults of a training stack instead of the ones above, see ``PRESETS``; explicit arguments win.
        nan: ``"raise"``, or ``"zero"``: a NaN or infinite reward gets advantage 0 and stays out of all statistics.
        token_mask: with it, ``token_advantages`` is filled: (N, T) for padded rollouts, or (tokens,) beside
            ``cu_seqlens``; the advantage where the mask is nonzero, 0 elsewhere.
        cu_seqlens: (N + 1,) cumulative lengths of packed rollouts.

    On a GPU everything is one launch on the current stream, if rewards are float32 or float64, labels of a signed type
    or uint8, and all on that GPU. The call waits for the device where it has something to check: with ``nan="raise"``
    or with ``cu_seqlens``.

    Raises:
        ValueError: a NaN or infinite reward with ``nan="raise"`` (the row is named), wrong lengths or unknown names.
        TypeError: rewards that are no numbers, labels that are no integers.
    """
    options = _resolve(preset, baseline=baseline, scale=scale, ddof=ddof, eps=eps, singleton=singleton)
    check_choice("nan", nan, ("raise", "zero"))
    rewards, narrow = as_rewards(rewards)
    labels = as_labels(group_ids, rewards)
    tokens = as_tokens(token_mask, cu_seqlens, rewards)
    finite = nan == "raise"
    if is_tensor(rewards):
        from hiexp.ops._group_advantage_operator import operator

        outputs = operator(
            rewards, labels, tokens.offsets, tokens.mask, tokens.width, tokens.total, *options.values(), finite
        )
    else:
        outputs = launch_numpy(rewards, labels, tokens, tuple(options.values()), finite=finite)
    advantages, zero_variance, mean, std, counts, token_advantages, notes = outputs
    spread = None if tokens.shape is None else token_advantages.reshape(tokens.shape)
    result = GroupAdvantage(advantages, zero_variance, spread, notes[0], labels, mean, std, counts)
    return _to_float32(result) if narrow else result


def _to_float32(result: GroupAdvantage) -> GroupAdvantage:
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    for name in ("advantages", "token_advantages", "_mean", "_std"):
        values[name] = None if values[name] is None else values[name].float()
    return GroupAdvantage(**values)


def _resolve(preset: str | None, **given: Any) -> dict[str, Any]:
    """Options after preset and explicit arguments; their names are checked where they become enums (options.h)."""
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
    options = {**(_GRPO if preset is None else PRESETS[preset]), **{k: v for k, v in given.items() if v is not None}}
    for name in ("baseline", "scale", "singleton"):
        if not isinstance(options[name], str):
            raise TypeError(f"{name}: expected a string, got {describe(options[name])}")
    if options["ddof"] not in (0, 1) or isinstance(options["ddof"], bool):
        raise ValueError(f"ddof: expected 0 or 1, got {options['ddof']!r}")
    options["eps"] = check_number("eps", options["eps"], 0.0)
    return options
