"""What a run needs around it: the search tool, the model's server, a writable directory with room, other stacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hiexp.experience.encoder import HashingEncoder
from hiexp.io import DataError
from hiexp.preflight.check import Check, gib

if TYPE_CHECKING:
    from hiexp.agent.tools import Document
    from hiexp.rl.config import ToolConfig, TrainConfig

_ROWS = 1000  # passages read to see whether a corpus is one
# For the size of an index that is not built yet: a usual length of a sentence encoder's vectors (loading it to ask
# would take seconds), bytes of a row besides its text, and how far gzip packs such text.
_ENCODER_DIM, _FRAME, _PACKED = 768, 60, 3
_STACKS = ("verl", "trl", "openrlhf", "skyrl", "slime")


def tool_check(config: TrainConfig) -> Check:
    """Whether the search tool answers, or the corpus is there and readable."""
    tool = config.tool
    if tool.kind == "none":
        return Check("search", "ok", "none")
    if tool.kind in ("bm25", "dense") and tool.index is None:
        return _corpus(tool)
    if tool.kind == "dense" and tool.index is not None and _unbuilt(tool):
        text = f"{tool.index}: no part for tool.method {tool.method} yet; the run builds it there first"
        return Check(
            "search", "warn", text, f"build it ahead: hiexp index CORPUS --out {tool.index} --kind {tool.method}"
        )
    from hiexp.rl.setup import make_tool

    try:
        made = make_tool(tool)
    except (ValueError, OSError, ImportError) as error:
        mend = (
            "start it (hiexp serve-retriever --corpus FILE), or mend tool.url" if tool.kind == "http" else "see tool.*"
        )
        return Check("search", "error", str(error), mend)
    return Check("search", "ok", f"{tool.kind} answers ({getattr(made, 'identity', made.name)})")


def _unbuilt(tool: ToolConfig) -> bool:
    """Whether opening the index would build in it, which the doctor does not."""
    from hiexp.agent.dense_faiss import DEFAULT_EFFORT, faiss_folder

    known = tool.method in DEFAULT_EFFORT and importlib.util.find_spec("faiss") is not None
    return known and Path(str(tool.index)).is_dir() and not faiss_folder(Path(str(tool.index)), tool.method).exists()


def _corpus(tool: ToolConfig) -> Check:
    from hiexp.agent.corpus import read_corpus

    path, kind = tool.corpus, tool.kind
    if not path:
        return Check("search", "error", f"tool.kind {kind} without tool.corpus", "name a JSONL file of passages")
    try:
        rows = list(islice(read_corpus(path), _ROWS))
    except (DataError, OSError) as error:
        return Check("search", "error", str(error), "passages have the columns id, title and text, or id and contents")
    size = Path(path).stat().st_size
    needed = "bm25s" if kind == "bm25" else "sentence_transformers" if tool.encoder.startswith("st:") else None
    if needed is not None and importlib.util.find_spec(needed) is None:
        text = f"tool.kind {kind} needs the package {needed}, which is not installed"
        return Check("search", "error", text, "pip install 'hiexp[train]'")
    # Its index is named by the hash of the file, so one of another corpus cannot be taken by mistake.
    text = f"{kind} over {path}: {gib(size)}, the first {len(rows):,} passages are readable"
    return Check("search", "ok", text if kind == "bm25" else f"{text}; {_index_size(tool, rows, size)}")


def _index_size(tool: ToolConfig, rows: Sequence[Document], size: int) -> str:
    """What a dense index of the corpus will take, from the length of its first passages."""
    from hiexp.agent.index_memory import memory_estimate

    text_bytes = max(1, sum(len(row.text.encode()) for row in rows) // len(rows))
    packed = _PACKED if tool.corpus.endswith(".gz") else 1
    passages = max(len(rows), size * packed // (text_bytes + _FRAME))
    dim = HashingEncoder().dim if tool.encoder == "hashing" else _ENCODER_DIM
    told = memory_estimate(passages, dim, tool.method, dtype=tool.dtype, text_bytes=text_bytes)
    return (
        f"its index, for about {passages:,} vectors of {dim}: {gib(told.disk)} on disk, {gib(told.resident)} resident"
    )


def server_checks(config: TrainConfig) -> list[Check]:
    """Whether ``rollout.server`` samples tokens."""
    if not config.rollout.server:
        return []
    from hiexp.agent.openai_server import OpenAIServer

    model = config.rollout.server_model or config.model.path
    try:
        server = OpenAIServer(model, config.rollout.server, timeout_s=30.0, retries=0)
        server.post("/completions", {"prompt": [1], "max_tokens": 1})
    except (ValueError, OSError) as error:
        return [Check("server", "error", str(error), f"start it (vllm serve {model}), or mend rollout.server")]
    return [Check("server", "ok", f"{model} answers at {config.rollout.server}")]


def directory_checks(config: TrainConfig, checkpoint: int | None) -> list[Check]:
    """Whether the run directory can be written, belongs to this config, and has room for its checkpoints.

    ``checkpoint``: bytes of one, see :func:`hiexp.preflight.memory.checkpoint_bytes`.
    """
    from hiexp.rl.run_directory import RunDirectory

    path = Path(config.run.dir)
    try:
        RunDirectory(config)
    except (ValueError, OSError) as error:
        return [Check("run.dir", "error", str(error), "choose another run.dir, or restore the settings")]
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return [Check("run.dir", "error", f"{there} cannot be written", "choose another run.dir")]
    state = "continues the run there" if (path / "config.resolved.yaml").exists() else "a new run"
    checks = [Check("run.dir", "ok", f"{path}: {state}")]
    if checkpoint is None:
        return checks
    # Besides the kept ones the best one, and one more while it is being written.
    needed, free = checkpoint * (config.run.keep_last + 2), shutil.disk_usage(there).free
    text = f"{config.run.keep_last + 2} checkpoints take {gib(needed)}, {gib(free)} are free"
    if needed > free:
        checks.append(Check("disk", "error", text, "free some space, lower run.keep_last, or choose another run.dir"))
    else:
        checks.append(Check("disk", "ok", text))
    return checks


def plugin_checks() -> list[Check]:
    """Whether the adapters for the training stacks that are installed here really load."""
    checks = []
    for stack in _STACKS:
        if importlib.util.find_spec(stack) is None or importlib.util.find_spec("hiexp.integrations") is None:
            continue
        if importlib.util.find_spec(f"hiexp.integrations.{stack}") is None:
            continue
        version = importlib.metadata.version(stack)
        try:
            importlib.import_module(f"hiexp.integrations.{stack}")
        except Exception as error:  # an adapter may fail in any way its stack can
            checks.append(
                Check(
                    f"plug-in {stack}",
                    "error",
                    f"does not load with {stack} {version}: {type(error).__name__}: {error}",
                    f"install a version of {stack} that docs/ names",
                )
            )
        else:
            checks.append(Check(f"plug-in {stack}", "ok", f"loads with {stack} {version}"))
    return checks
