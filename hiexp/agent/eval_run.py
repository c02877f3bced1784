"""Data sets times arms: answers from the store or the model, scores, intervals, differences, averages over sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiexp.agent.arms import ARMS, ArmActor
from hiexp.agent.engine import Sampling
from hiexp.agent.eval_store import RolloutStore
from hiexp.progress import track
from hiexp.rl.act import rollout_seed
from hiexp.rl.evaluate import Arm, summarise
from hiexp.rl.metrics import ServiceCounts, mean
from hiexp.rl.reward import QuestionTask, check_rewards, score_rollouts
from hiexp.tasks.judge import Answered, Judge
from hiexp.tasks.judged import judged_sources
from hiexp.tasks.qa import load_questions, repeated_texts
from hiexp.tasks.question import Question
from hiexp.tasks.scorers import make_scorer
from hiexp.tasks.statistics import bootstrap_interval, macro_interval, paired_difference, pass_at_k

if TYPE_CHECKING:
    from hiexp.agent.engine import Engine
    from hiexp.agent.record import Rollout
    from hiexp.agent.rollout import SearchAgent
    from hiexp.agent.tools import Tool
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.config import TaskConfig, TrainConfig

_BINARY = ("em", "cem", "accuracy", "judge")  # right or wrong, so that pass@k means something
Values = dict[str, NDArray[np.float64]]  # metric -> (Q,), the mean over the samples of each question


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One data set of an evaluation: where it is from, what is asked, how answers are judged."""

    name: str
    source: str
    questions: Sequence[Question]
    task: QuestionTask
    config: TaskConfig
    headline: str


@dataclass(slots=True)
class Evaluator:
    """Answers and scores data sets arm by arm. ``out``: folder that keeps rollouts and verdicts, or None."""

    engine: Engine
    tool: Tool
    config: TrainConfig
    snapshot: Snapshot | None
    arms: Sequence[str]
    samples: int
    judge: Judge | None
    out: Path | None

    def evaluate(self, one: EvalSet) -> tuple[dict[str, Any], dict[str, Values]]:
        """The result of one set as JSON, and the scores (Q,) behind it by arm."""
        done: dict[str, Arm] = {}
        counted: dict[str, dict[str, int]] = {}
        for name in self.arms:
            counts = ServiceCounts(self.tool, one.task)
            done[name] = self._arm(one, name)
            counted[name] = counts.read()
        values = {name: _by_question(arm) for name, arm in done.items()}
        differences = {
            name: {metric: paired_difference(values[name][metric], values[other][metric]) for metric in values[name]}
            for name, other in ((name, ARMS[name].against) for name in self.arms)
            if other in values and other != name
        }
        result = {
            "source": one.source, "kind": one.config.kind, "metric": one.headline,
            "scorer": "math" if one.config.kind == "maths" else one.config.scorer,
            "n_questions": len(one.questions), "repeated_questions": len(repeated_texts(one.questions)),
            "without_hek": None, "with_hek": None,
            **{name: {**_told(arm, values[name]), **counted[name]} for name, arm in done.items()},
            "differences": differences,
        }  # fmt: skip
        return result, values

    def _arm(self, one: EvalSet, name: str) -> Arm:
        store = RolloutStore(None if self.out is None else self.out / one.name / f"{name}.jsonl", one.questions)
        snapshot = self.snapshot if ARMS[name].hek else None
        rows = [(place, index) for place in range(len(one.questions)) for index in range(self.samples)]
        ids = [f"{one.questions[place].id}/0/{index}" for place, index in rows]
        todo = [row for row, identifier in zip(rows, ids, strict=True) if identifier not in store.kept]
        actor = ArmActor(self.engine, self.tool, self.config, ARMS[name].style)
        agent = actor.agent(Sampling(self.config.evaluation.temperature, 1.0))
        begin, before = time.perf_counter(), self._usage()
        for rollout in track(self._answers(agent, one, todo, snapshot), f"{one.name}, {ARMS[name].title}", len(todo)):
            end, now = time.perf_counter(), self._usage()
            store.add([rollout], end - begin, {key: now[key] - before[key] for key in now})
            begin, before = end, now
        rollouts = [store.kept[identifier] for identifier in ids]
        # Scored here and not when they came: kept rollouts follow the scorer of today.
        questions = [one.questions[place] for place, _ in rows]
        metric = one.config.metric
        rewards = score_rollouts(rollouts, questions, one.task, metric, one.config.malformed_reward)
        check_rewards(rewards, rollouts, "zero")
        self._let_judge(rollouts, questions)
        return Arm(rollouts, rewards, self.samples, store.seconds, store.usage)

    def _usage(self) -> dict[str, int]:
        """What a server that alone knows its tokens has counted so far."""
        return dict(getattr(self.engine, "usage", {}))

    def _answers(
        self, agent: SearchAgent, one: EvalSet, rows: Sequence[tuple[int, int]], snapshot: Snapshot | None
    ) -> Iterator[Rollout]:
        """A rollout for each (place in the set, index of the sample), as they end."""
        return agent.stream(
            [one.questions[place] for place, _ in rows],
            snapshot=snapshot,
            with_experience=[snapshot is not None] * len(rows),
            indices=[index for _, index in rows],
            # By the place in the data set alone: which rows are left after a kill does not matter.
            seeds=[rollout_seed(self.config.run.seed, 0, place, index) for place, index in rows],
        )

    def _let_judge(self, rollouts: Sequence[Any], questions: Sequence[Question]) -> None:
        if self.judge is None:
            return
        verdicts = self.judge(
            [
                Answered(one.text, one.golden_answers, rollout.answer)
                for one, rollout in zip(questions, rollouts, strict=True)
            ]
        )
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            rollout.scores["judge"] = float(bool(verdict))


def load_sets(config: TrainConfig, sources: Sequence[str], judged: bool) -> list[EvalSet]:
    """The data sets of ``sources``; judged as :mod:`hiexp.tasks.judged` finds, else as the config says.

    Raises:
        ValueError: a source without a kind whose columns are those of maths sets, under ``task.kind: qa``.
        DataError, ValueError: see :func:`hiexp.tasks.qa.load_questions`.
    """
    sets: list[EvalSet] = []
    split = config.task.evaluation_split
    for told, count in [one for joined in sources for one in judged_sources(joined, split)]:
        task = replace(config.task, evaluation=told.source)
        if told.kind not in (None, task.kind):
            task = replace(task, kind=told.kind, metric="accuracy" if told.kind == "maths" else "f1")
        problem = told.mismatch(task.kind)
        if problem:
            raise ValueError(f"{problem}; write maths={told.source}, or qa={told.source} to compare text")
        headline = task.metric if told.named is None else told.named.metric
        if headline == "judge" and not judged:
            headline = task.metric
        questions = load_questions(told.source, split, min(count or sys.maxsize, config.evaluation.questions))
        scorer = make_scorer("math" if task.kind == "maths" else task.scorer)
        name = told.name if told.name not in {one.name for one in sets} else f"{told.name}_{len(sets) + 1}"
        where = told.source if told.named is None or Path(told.source).exists() else told.named.source
        sets.append(EvalSet(name, where, questions, QuestionTask(questions, [], scorer, 0), task, headline))
    return sets


def _by_question(arm: Arm) -> Values:
    return {name: values.mean(axis=1) for name, values in arm.by_question().items()}


def _told(arm: Arm, values: Values) -> dict[str, Any]:
    """Means with intervals, tokens, searches, time; for several samples pass@k of scores that are right or wrong."""
    rollouts = arm.rollouts
    result: dict[str, Any] = dict(summarise(rollouts, arm.rewards))
    result["sampled_tokens"] = mean([sum(rollout.loss_mask) for rollout in rollouts])
    result["tokens"] = mean([len(rollout.token_ids) for rollout in rollouts])
    if arm.usage:
        # The ids of such an engine are not the model's tokens; the server counted those.
        spent = dict(arm.usage)
        answers, known = spent.pop("answers"), not spent["requests_without_usage"]
        result |= {**spent, "tokens": None, "sampled_tokens": spent["completion_tokens"] / answers if known else None}
    calls = [call for rollout in rollouts for call in rollout.tool_calls]
    result["failed_searches"] = sum(call.status in ("error", "timeout") for call in calls)
    result["duplicate_searches"] = sum(call.status == "duplicate" for call in calls)
    result["engine_restarts"] = sum(rollout.engine_restarts for rollout in rollouts)
    result["seconds"] = arm.seconds
    intervals = {name: bootstrap_interval(scores) for name, scores in values.items()}
    for name, scores in arm.by_question().items():
        if arm.samples > 1 and name in _BINARY:
            for k in _ks(arm.samples):
                chances = pass_at_k(scores == 1.0, k)
                result[f"{name}_pass@{k}"] = float(chances.mean())
                intervals[f"{name}_pass@{k}"] = bootstrap_interval(chances)
    return {**result, "intervals": intervals}


def _ks(samples: int) -> list[int]:
    """2, 4, 8, … and the number of samples; pass@1 is the mean itself."""
    return sorted({2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples})


def macro_average(scores: Mapping[str, Mapping[str, Values]], headlines: Mapping[str, str]) -> dict[str, Any]:
    """Mean over data sets of each metric that all of them have, by arm; every set counts the same.

    ``main`` is the mean of each set's own headline metric, there where these differ.

    Args:
        scores: data set -> arm -> metric -> (Q,). headlines: data set -> metric.

    Returns:
        ``{"sets": n, arm: {metric: mean, "intervals": {...}}, "differences": {arm: {metric: (mean, low, high)}}}``.
    """
    parts = [dict(part) for part in scores.values()]
    if len(set(headlines.values())) > 1:
        for part, name in zip(parts, scores, strict=True):
            part.update({arm: {**values, "main": values[headlines[name]]} for arm, values in part.items()})
    result: dict[str, Any] = {"sets": list(scores), "differences": {}}
    for arm in parts[0]:
        metrics = [metric for metric in parts[0][arm] if all(metric in part[arm] for part in parts)]
        columns = {metric: [part[arm][metric] for part in parts] for metric in metrics}
        result[arm] = {metric: float(np.mean([v.mean() for v in sets])) for metric, sets in columns.items()}
        result[arm]["intervals"] = {metric: macro_interval(sets) for metric, sets in columns.items()}
        other = ARMS[arm].against
        if other != arm and other in parts[0]:
            result["differences"][arm] = {
                metric: _macro_difference([part[arm][metric] - part[other][metric] for part in parts])
                for metric in metrics
            }
    return result


def _macro_difference(sets: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    return float(np.mean([values.mean() for values in sets])), *macro_interval(sets)
