"""What ``hiexp eval --out DIR`` keeps, so that a killed evaluation goes on where it stopped.

    settings.json   result.json   judge.jsonl   SET/ARM.jsonl   SET/ARM.seconds.json

``ARM.jsonl`` holds the rollouts in the order in which they were finished; a rollout is found again by its id, so more
questions or more samples per question may be asked for later.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.record import Rollout
from hiexp.io import DataError, append_jsonl, atomic_write, read_jsonl
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.config import TrainConfig

RESULT = "result.json"
# Stages and settings that answers do not depend on; a server may come back under another address.
_UNUSED = ("run", "algorithm", "credit", "alarms", "task", "evaluation")
IRRELEVANT = (
    ("rollout", "batch_rows"), ("rollout", "remote_calls"), ("rollout", "engine_retries"), ("rollout", "server"),
    ("rollout", "vllm_cache_gib"), ("rollout", "weights_dir"), ("rollout", "sync_tolerance"), ("rollout", "staleness"),
    ("tool", "cache_dir"), ("tool", "record"), ("tool", "cached_queries"), ("tool", "connections"), ("tool", "retries"),
    ("tool", "calls_per_second"),
)  # fmt: skip


def eval_settings(config: TrainConfig, snapshot: Snapshot | None, tool: str) -> dict[str, Any]:
    """Everything the answers depend on besides the questions; ``tool``: the identity of the search tool."""
    values = {stage: part for stage, part in config.to_dict().items() if stage not in _UNUSED}
    for stage, key in IRRELEVANT:
        values[stage].pop(key)
    values["experience"].pop("hek")  # its snapshot counts, not where it lies
    return {
        "command": "eval",
        **values,
        "seed": config.run.seed,
        "temperature": config.evaluation.temperature,
        "snapshot_id": None if snapshot is None else snapshot.id,
        "tool_identity": tool,
    }


class RolloutStore:
    """Finished rollouts of one arm on one data set; without a path they are in memory only.

    Attributes:
        kept: rollouts by id. seconds, usage: wall time, and requests and tokens of a server that counts them, spent on
            them, earlier runs included.
    """

    def __init__(self, path: Path | None, questions: Sequence[Question]) -> None:
        self._path = path
        self.kept: dict[str, Rollout] = {}
        self.seconds, self.usage = 0.0, Counter[str]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._timing = path.with_suffix(".seconds.json")
        if self._timing.is_file():
            spent = json.loads(self._timing.read_text(encoding="utf-8"))
            self.seconds, self.usage = float(spent["seconds"]), Counter(spent.get("usage", {}))
        if path.is_file():
            texts = {question.id: question.text for question in questions}
            for line, row in read_jsonl(path, torn_tail=True):
                self._keep(_rollout(path, line, row, texts))

    def add(self, rollouts: Sequence[Rollout], seconds: float, usage: Mapping[str, int]) -> None:
        """Keep finished rollouts and what they took, on the disk before this returns."""
        for rollout in rollouts:
            self._keep(rollout)
        self.seconds += seconds
        self.usage.update({**usage, "answers": len(rollouts)} if usage else {})
        if self._path is not None:
            append_jsonl(self._path, [rollout.to_json() for rollout in rollouts])
            atomic_write(self._timing, json.dumps({"seconds": self.seconds, "usage": self.usage}) + "\n")

    def _keep(self, rollout: Rollout) -> None:
        self.kept[rollout.rollout_id] = rollout


def _rollout(path: Path, line: int, row: dict[str, Any], texts: Mapping[str, str]) -> Rollout:
    try:
        rollout = Rollout.from_json(row)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}:{line}: expected a rollout, got {sorted(row)[:12]} ({error})") from error
    asked = texts.get(rollout.question_id)
    if asked is not None and asked != rollout.question:
        raise DataError(
            f"{path}:{line}: question {rollout.question_id!r} was another one when this rollout was made; the question "
            "file changed, choose another --out"
        )
    return rollout
