"""hiexp: hierarchical experience knowledge for search and reasoning agents.

Public names load on first use, so ``import hiexp`` stays fast and needs numpy alone. They are listed in the order data
flows through them: questions -> rollouts -> experience -> retrieval -> log-probs, advantage, loss -> training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiexp.agent.record import Rollout
    from hiexp.agent.rollout import SearchAgent
    from hiexp.doctor import build_info
    from hiexp.experience.abstract import build_hierarchy
    from hiexp.experience.distill import distill
    from hiexp.experience.record import Experience
    from hiexp.experience.retrieve import retrieve
    from hiexp.experience.store import HEK
    from hiexp.ops.clustering import AgglomerativeClustering, cut_tree, linkage
    from hiexp.ops.group_advantage import group_advantage
    from hiexp.ops.linear_policy_loss import linear_policy_loss
    from hiexp.ops.paired_logprobs import paired_logprobs
    from hiexp.ops.policy_loss import policy_loss
    from hiexp.ops.score_group import score_group
    from hiexp.ops.token_logprobs import token_logprobs
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.trainer import GRPOTrainer

    _core: Any

_HOME = {
    "Rollout": "hiexp.agent.record",
    "SearchAgent": "hiexp.agent.rollout",
    "Experience": "hiexp.experience.record",
    "distill": "hiexp.experience.distill",
    "build_hierarchy": "hiexp.experience.abstract",
    "HEK": "hiexp.experience.store",
    "retrieve": "hiexp.experience.retrieve",
    "linkage": "hiexp.ops.clustering",
    "cut_tree": "hiexp.ops.clustering",
    "AgglomerativeClustering": "hiexp.ops.clustering",
    "token_logprobs": "hiexp.ops.token_logprobs",
    "paired_logprobs": "hiexp.ops.paired_logprobs",
    "score_group": "hiexp.ops.score_group",
    "group_advantage": "hiexp.ops.group_advantage",
    "policy_loss": "hiexp.ops.policy_loss",
    "linear_policy_loss": "hiexp.ops.linear_policy_loss",
    "TrainConfig": "hiexp.rl.config",
    "GRPOTrainer": "hiexp.rl.trainer",
    "build_info": "hiexp.doctor",
}

__version__ = "0.1.0"
__all__ = [
    "HEK", "AgglomerativeClustering", "Experience", "GRPOTrainer", "Rollout", "SearchAgent", "TrainConfig",
    "build_hierarchy", "build_info", "cut_tree", "distill", "group_advantage", "linear_policy_loss", "linkage",
    "paired_logprobs", "policy_loss", "retrieve", "score_group", "token_logprobs",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "_core":
        return _load_core()
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hiexp' has no attribute {name!r}")


def _load_core() -> Any:
    try:
        core = importlib.import_module("hiexp._core")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the compiled module hiexp._core is not in {__path__[0]}; if this is a source checkout that shadows an "
            "installed wheel, run from another folder or install editable: pip install -e ."
        ) from error
    built = getattr(core, "version", None)
    if built != __version__:
        globals().pop("_core", None)  # or the next use would find it unchecked
        raise ImportError(f"hiexp._core is of version {built}, its Python files of {__version__}; {_REBUILD}")
    # Signature for signature it cannot be checked; what a newer Python file asks for in vain is the usual sign.
    core.__dict__["__getattr__"] = _missing_in_core
    return core


_REBUILD = "rebuild it: pip install -e . in a checkout, else pip install --force-reinstall --no-deps hiexp"


def _missing_in_core(name: str) -> Any:
    if name.startswith("__"):  # what Python itself looks for
        raise AttributeError(f"module 'hiexp._core' has no attribute {name!r}")
    raise ImportError(f"hiexp._core has no {name!r}: it was built before the Python files beside it; {_REBUILD}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
