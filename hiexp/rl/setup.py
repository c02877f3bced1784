"""From config to the parts of a run: task, tool and HEK snapshot. Everything cheap is checked before a model loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.experience.guard import leaking_entries
from hiexp.experience.retrieve import Snapshot
from hiexp.rl.config import ExperienceConfig, TaskConfig, ToolConfig, TrainConfig
from hiexp.rl.reward import QuestionTask
from hiexp.rl.run_directory import RunDirectory
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.tools import Document, Tool


def check_training(config: TrainConfig, processes: int = 1) -> None:
    """Refuse what cannot be trained, as far as the config and the installed packages tell; the doctor asks the same.

    ``processes``: how many there will be, as far as it is known.

    Raises:
        ValueError: an unknown tracker, or settings of the engine that contradict each other.
        ImportError: a package that the settings need is missing.
    """
    from hiexp.rl.make_engine import check_engine
    from hiexp.rl.trackers import check_trackers

    check_engine(config, processes)
    needed = (("peft", "train", "model.lora_rank", config.model.lora_rank > 0),
              ("vllm", "vllm", "rollout.engine: vllm", config.rollout.engine == "vllm"))  # fmt: skip
    for package, extra, key, used in needed:
        if used and importlib.util.find_spec(package) is None:
            require(package, extra, key)
    check_trackers(config.run.trackers)


def check_task(config: TaskConfig) -> None:
    """Refuse a task without questions to load.

    Raises:
        ValueError: a kind that has to be passed to the trainer as an object, or no source of training questions.
    """
    if config.kind == "miniworld":
        raise ValueError("task.kind: miniworld is built in memory; run hiexp quickstart, or pass task= to GRPOTrainer")
    if not config.train:
        raise ValueError("task.train: expected a JSONL(.gz) file or a hub data set, got an empty string")


def make_task(config: TaskConfig, seed: int) -> QuestionTask:
    """Load the questions of ``config`` and the scorer for them.

    Raises:
        ValueError: no source of training questions, a kind that has to be passed to the trainer as an object, or
            questions whose answers are of another kind than ``task.kind``.
        DataError: unusable files; the message names file and line.
    """
    from hiexp.tasks.judged import MEND, mismatches
    from hiexp.tasks.qa import load_questions
    from hiexp.tasks.scorers import make_scorer

    check_task(config)
    training = load_questions(config.train, config.train_split, config.train_limit)
    evaluation = load_questions(config.evaluation, config.evaluation_split) if config.evaluation else []
    for source, split in ((config.train, config.train_split), (config.evaluation, config.evaluation_split)):
        if source and (problems := mismatches(source, split, config.kind)):
            raise ValueError(f"{problems[0]}; {MEND[config.kind]}")
    scorer = make_scorer("math" if config.kind == "maths" else config.scorer)
    return QuestionTask(training, evaluation, scorer, seed)


class NoSearch:
    """The tool of a task without documents: every query comes back empty."""

    name = "none"

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Document]]:
        """No documents for each query."""
        return [[] for _ in queries]


def make_tool(config: ToolConfig) -> Tool:
    """The search tool of ``config``, behind its recording where there is one; a retriever server must answer now.

    Raises:
        ValueError: a setting that the kind needs is missing or unusable.
        DataError: unusable corpus. ServiceError: the server does not answer as it should.
    """
    if config.kind == "replay":
        from hiexp.agent.recorded_tool import RecordedTool

        if config.record is None:
            raise ValueError("tool.record: expected the file of a recording for tool.kind 'replay', got null")
        return RecordedTool(config.record)
    tool = _searching_tool(config)
    if config.record is not None:
        from hiexp.agent.recorded_tool import RecordedTool

        tool = RecordedTool(config.record, tool)
    if config.cached_queries == 0:
        return tool
    from hiexp.agent.cached_tool import CachedTool

    return CachedTool(tool, config.cached_queries)


def _searching_tool(config: ToolConfig) -> Tool:
    if config.kind == "none":
        return NoSearch()
    if config.kind in ("http", "web"):
        return _remote_tool(config)
    from hiexp.agent.search_tools import open_index, search_corpus

    dense: dict[str, Any] = {
        "method": config.method,
        "effort": config.effort,
        "device": config.device,
        "query_prefix": config.query_prefix,
    }
    if config.index is not None:
        return open_index(config.index, corpus=config.corpus or None, kind=config.kind, encoder=config.encoder, **dense)
    if not config.corpus:
        raise ValueError(
            f"tool.corpus: expected a JSONL(.gz) file, or tool.index, for tool.kind {config.kind!r}; got neither"
        )
    if config.kind == "dense":
        dense |= {"encoder": config.encoder, "dtype": config.dtype, "passage_prefix": config.passage_prefix}
    return search_corpus(config.corpus, kind=config.kind, cache_dir=config.cache_dir, **dense)


def _remote_tool(config: ToolConfig) -> Tool:
    shared: dict[str, Any] = {
        "timeout_s": config.timeout_s,
        "retries": config.retries,
        "connections": config.connections,
    }
    if config.kind == "http":
        from hiexp.agent.http_tool import HttpTool

        remote = HttpTool(config.url, **shared)
        remote.check()
        return remote
    from hiexp.agent.web_tool import WebTool

    # Not tried out here: every request costs money.
    return WebTool(
        config.provider,
        config.url,
        key_env=config.key_env,
        max_calls=config.max_calls,
        calls_per_second=config.calls_per_second,
        **shared,
    )


def choose_snapshot(config: ExperienceConfig, directory: RunDirectory, given: Snapshot | None) -> Snapshot | None:
    """The snapshot the run uses to its end: the pinned one, else the one ``given``, else the HEK's current one.

    Raises:
        ValueError: ``given`` is not the pinned one.
        DataError: no HEK at ``experience.hek``, or a damaged pinned file.
    """
    file = directory.pinned_snapshot()
    if file is not None:
        pinned = Snapshot.read(file)
        if given is not None and given.id != pinned.id:
            raise ValueError(
                f"snapshot: the run in {directory.path} is pinned to {pinned.id[:16]}, got {given.id[:16]}"
            )
        # The one passed in has its encoder loaded.
        return given if given is not None else pinned
    if given is not None or config.hek is None:
        return given
    from hiexp.experience.store import HEK

    with HEK.open(config.hek, mode="r") as hek:
        return hek.snapshot()


def check_leaks(snapshot: Snapshot | None, questions: Sequence[Question]) -> None:
    """Refuse experience that gives away an answer of the run's own questions.

    Raises:
        ValueError: names the first such entry, why, and how many there are.
    """
    leaks = leaking_entries(snapshot, questions) if snapshot is not None else []
    if leaks:
        exp_id, reason = leaks[0]
        raise ValueError(
            f"experience: {len(leaks)} entries must not be shown with these training and evaluation questions, first "
            f"{exp_id}: {reason}. Distil again with the question files: hiexp distill ... --questions FILE [FILE ...]"
        )


def snapshot_metrics(snapshot: Snapshot | None) -> dict[str, Any]:
    """Id of the snapshot and entries per level."""
    entries = () if snapshot is None else snapshot.entries
    sizes = {f"hek_{level}": sum(entry.level == level for entry in entries) for level in ("E1", "E2", "E3")}
    return {"snapshot_id": None if snapshot is None else snapshot.id, **sizes}
