"""Policy losses by name: the built-in kinds, and how to add one without touching this package.

A loss of one's own is one function: it gets a :class:`LossBatch` and returns one loss a token, and whatever it wants to
see in the metrics. Importance weights, the KL term, the aggregation and the cutting into micro-batches are the same for
all losses and are done around it (registered_loss.py)::

    @register("reinforce")
    def reinforce(batch):
        return -batch.advantages * batch.logprobs

``algorithm.kind`` selects a loss by its name, or finds a function in a file or module: ``FILE.py:FUNCTION``,
``MODULE:FUNCTION``. Built-in kinds run through ``hiexp.linear_policy_loss``, which never stores logits. No torch is
imported here: configs are checked without it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AGGREGATIONS = ("token", "sequence", "constant", "sum")


@dataclass(frozen=True, slots=True)
class LossBatch:
    """What a loss of one's own sees: the N trained tokens of S rollouts, one after the other.

    Attributes:
        logprobs: (N,) of the policy, with gradient.
        entropy: (N,) of the policy at each token, in nats, with gradient.
        old_logprobs: (N,), the denominator of the ratio; equal to ``logprobs`` in the only update of a step.
        advantages: (N,), each token its rollout's.
        ref_logprobs: (N,) of the frozen starting model, None with ``kl_coef`` 0.
        engine_logprobs: (N,), what the engine sampled with.
        mask: (N,) bool, tokens that count; micro-batches of the trainer hold no others.
        cu_seqlens: (S + 1,) int64, rollout s has the tokens [cu_seqlens[s], cu_seqlens[s + 1]).
        settings: ``clip_low``, ``clip_high`` and the numbers of ``algorithm.loss_settings``.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    ref_logprobs: torch.Tensor | None
    engine_logprobs: torch.Tensor | None
    mask: torch.Tensor
    cu_seqlens: torch.Tensor
    settings: Mapping[str, float]

    def ratio(self) -> torch.Tensor:
        """(N,) exp(logprobs - old_logprobs), the exponent bounded to [-20, 20] as in the built-in losses."""
        return (self.logprobs - self.old_logprobs).clamp(-20.0, 20.0).exp()

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) each token its rollout's mean of ``values`` (N,) over the tokens that count, with gradient."""
        counts = self.cu_seqlens.diff()
        sequence = counts.new_tensor(range(len(counts))).repeat_interleave(counts)
        kept = values.where(self.mask, values.new_zeros(()))
        sums = values.new_zeros(len(counts)).index_add(0, sequence, kept)
        lengths = values.new_zeros(len(counts)).index_add(0, sequence, self.mask.to(values.dtype))
        return (sums / lengths.clamp(min=1))[sequence]


# (N,) losses, or those and (N,) values by name whose means over tokens become the metrics loss/NAME.
LossFunction = Callable[[LossBatch], "torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a kind of loss is.

    Attributes:
        fused: its name in ``hiexp.linear_policy_loss``; None where ``function`` computes it.
        aggregation: see ``algorithm.aggregation``.
        preset: convention of ``hiexp.group_advantage``; None is its default.
        function: the loss of one's own.
        clip: its own ``clip_low`` and ``clip_high``: the ratio is bounded to [1 - low, 1 + high].
    """

    fused: str | None
    aggregation: str
    preset: str | None = None
    function: LossFunction | None = None
    clip: tuple[float, float] = (0.2, 0.2)

    def clip_range(self, low: float | None, high: float | None) -> tuple[float, float]:
        """What ``algorithm.clip_low`` and ``clip_high`` mean for this kind.

        Both null are the kind's own. A lower bound without an upper one is symmetric, except for dapo: so it was before
        the kinds had ranges of their own, and files from then mean the same.
        """
        own_low, own_high = self.clip
        if high is None:
            high = own_high if low is None or self.fused == "dapo" else low
        return own_low if low is None else low, high


_RECIPES: dict[str, Recipe] = {
    # Without a range of its own a kind has PPO's, 0.2 (arXiv:1707.06347, section 6.1).
    "grpo": Recipe("grpo", "sequence"),  # arXiv:2402.03300, eq. 3
    "dr_grpo": Recipe("dr_grpo", "constant", "dr_grpo"),  # arXiv:2503.20783, eq. 2: no 1 / length, no division by std
    "dapo": Recipe("dapo", "token", clip=(0.2, 0.28)),  # arXiv:2503.14476, eq. 8: clip higher, every token alike
    # arXiv:2507.18071, eq. 5; section 5.1: a mean over a rollout moves far less than the ratio of a token.
    "gspo": Recipe("gspo", "sequence", clip=(3e-4, 4e-4)),
    # arXiv:2506.13585, eq. 4. It sets no lower bound, and no ratio is below 1 - 1; its upper one is not published, 5 is
    # ScaleRL's (arXiv:2510.13786).
    "cispo": Recipe("cispo", "token", clip=(1.0, 4.0)),
    # arXiv:2402.14740, eq. 8: REINFORCE on the whole rollout's log-prob, which is the sum over its tokens, against the
    # mean of the others. In further updates of a step each token's ratio is clipped as in PPO, which theirs has not.
    "rloo": Recipe("grpo", "sum", "rloo"),
}
BUILT_IN = tuple(_RECIPES)
_files: dict[tuple[str, str], ModuleType] = {}


def register(
    name: str,
    *,
    aggregation: str = "sequence",
    advantages: str | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: make a function selectable as ``algorithm.kind: name``.

    Args:
        name: not one that is taken by another function.
        aggregation: default of ``algorithm.aggregation`` for this loss.
        advantages: default of ``algorithm.advantage_preset``; None is (r - mean) / (std + 1e-6).
        clip: defaults of ``algorithm.clip_low`` and ``clip_high``.

    Raises:
        ValueError: the name is taken, or the aggregation is unknown.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}; got {aggregation!r}")
    if not name or ":" in name:
        raise ValueError(f"name: expected a name without ':', got {name!r}")

    def decorate(function: LossFunction) -> LossFunction:
        known = _RECIPES.get(name)
        # The same place again is a file or notebook cell that was run again.
        if known is not None and _place(known.function) != _place(function):
            raise ValueError(f"loss {name!r}: the name is taken by {_place(known.function)}")
        _RECIPES[name] = Recipe(None, aggregation, advantages, function, clip)
        return function

    return decorate


def _place(function: LossFunction | None) -> str:
    if function is None:
        return "a built-in kind"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"


def find_loss(kind: str) -> Recipe:
    """The loss that ``algorithm.kind`` means.

    Raises:
        ValueError: no such name, file, module or function; says which are there.
    """
    if ":" not in kind:
        if kind in _RECIPES:
            return _RECIPES[kind]
        near = difflib.get_close_matches(kind, _RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"algorithm.kind: expected one of {', '.join(_RECIPES)}, FILE.py:FUNCTION or MODULE:FUNCTION; "
            f"got {kind!r}{hint}"
        )
    source, _, name = kind.rpartition(":")
    module = _load_file(source) if source.endswith(".py") else _load_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        got = "none" if function is None else type(function).__name__
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"algorithm.kind: expected a function {name!r} in {source}, got {got}; callable there: "
            f"{', '.join(there) or 'nothing'}"
        )
    registered = (recipe for recipe in _RECIPES.values() if recipe.function is function)
    return next(registered, Recipe(None, "sequence", None, function))


def _load_file(source: str) -> ModuleType:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"algorithm.kind: no such file: {source}")
    key = (str(path.resolve()), hashlib.sha256(path.read_bytes()).hexdigest())
    if key not in _files:
        spec = importlib.util.spec_from_file_location(f"hiexp_loss_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"algorithm.kind: {source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickling look their module up by name.
        sys.modules[module.__name__] = module
        _execute(source, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
        _files[key] = module
    return _files[key]


def _load_module(source: str) -> ModuleType:
    module: ModuleType = _execute(source, lambda: importlib.import_module(source))
    return module


def _execute(source: str, load: Callable[[], Any]) -> Any:
    """Whatever the user's code raises becomes one error that names it; the cause is kept."""
    try:
        return load()
    except Exception as error:
        raise ValueError(f"algorithm.kind: {source} cannot be loaded ({type(error).__name__}: {error})") from error
