"""Settings that contradict each other, have no effect, or cannot do what they look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hiexp.preflight.check import Check

if TYPE_CHECKING:
    from hiexp.rl.config import TrainConfig

# bfloat16 keeps 8 significant bits: an update below half a step of 2^-8 of a weight's size rounds to nothing.
_BF16_STEP = 2.0**-9


def setting_checks(config: TrainConfig, device: str) -> list[Check]:
    """All that a look at the config alone can tell; ``device``: ``cpu`` or ``cuda``."""
    return [*_precision(config, device), *_unused(config), *_updates(config)]


def _precision(config: TrainConfig, device: str) -> Iterator[Check]:
    lr = config.algorithm.lr
    if config.model.dtype == "bfloat16" and 0 < lr < 1e-4:
        yield Check(
            "precision", "warn", f"weights in bfloat16 with lr {lr:g}: AdamW moves a weight by about lr, "
            f"and weights larger than {lr / _BF16_STEP:.1g} round back to where they were",
            "model.dtype: float32 (twice the memory), or a larger lr",
        )  # fmt: skip
    if config.model.dtype == "bfloat16" and device == "cpu":
        yield Check(
            "precision", "warn", "bfloat16 on a CPU without native support is several times slower than float32",
            "model.dtype: float32",
        )  # fmt: skip


def _unused(config: TrainConfig) -> Iterator[Check]:
    tool, rollout = config.tool, config.rollout
    pairs = [
        (tool.kind not in ("http", "web") and tool.url, "tool.url", f"tool.kind {tool.kind}"),
        (tool.kind in ("http", "web", "none") and tool.corpus, "tool.corpus", f"tool.kind {tool.kind}"),
        (tool.kind != "dense" and tool.encoder != "hashing", "tool.encoder", f"tool.kind {tool.kind}"),
        (rollout.server_model and not rollout.server, "rollout.server_model", "an empty rollout.server"),
        (config.evaluation.every and not config.task.evaluation, "evaluation.every", "no task.evaluation"),
        (config.algorithm.minibatches > config.run.questions_per_step * rollout.group_size, "algorithm.minibatches",
         "fewer rollouts than minibatches"),
    ]  # fmt: skip
    for unused, key, because in pairs:
        if unused:
            yield Check("unused", "warn", f"{key} has no effect with {because}", f"drop {key}")


def _updates(config: TrainConfig) -> Iterator[Check]:
    algorithm = config.algorithm
    if algorithm.lr == 0:
        yield Check("updates", "warn", "algorithm.lr is 0: nothing is learned", "set a learning rate")
    other = bool(config.rollout.server) or config.rollout.engine == "vllm"
    if other and algorithm.importance_cap is None and not algorithm.ratio_to_engine(config.rollout.staleness > 0):
        yield Check(
            "updates", "warn", "another engine samples, and algorithm.importance_cap is null", "set importance_cap: 2",
        )  # fmt: skip
    if algorithm.kl_coef == 0:
        yield Check("updates", "ok", "no KL term, so no reference model is held")
    if config.rollout.temperature < 0.3:
        yield Check(
            "updates", "warn", f"rollout.temperature {config.rollout.temperature:g}: rollouts will hardly differ",
            "0.6 to 1.0 is usual",
        )  # fmt: skip
