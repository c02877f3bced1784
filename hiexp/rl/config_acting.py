"""How a policy acts: settings of tasks, search, experience and rollouts, in the order in which the data passes them.

Part of :mod:`hiexp.rl.config`, which says where the sentences go and what the defaults are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hiexp.rl.config_parse import setting


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
    """How often a rollout goes on from its tokens after the engine died under it; then the run stops.
    Going on with fewer rollouts in flight, after memory ran out, does not count."""
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
