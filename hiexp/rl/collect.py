"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups that teach nothing are replaced by further questions.

Round 0 asks the step's own questions. As long as fewer groups than wanted are informative, and rounds are left, the
next round asks as many further questions as are missing. What a round asks and samples is a function of weights, seed,
step and round, so a resumed run collects the same. Replaced rollouts are still stored, and the step's metrics of reward
and behaviour are over all that was sampled; the update sees the kept groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hiexp.rl.act import ActedStep
from hiexp.rl.config import CreditConfig
from hiexp.rl.credit import informative_groups
from hiexp.rl.reward import Task, TaskBatch

# (round, questions wanted, ids that were asked already) -> their rollouts; may be fewer, or None where there are none.
ActRound = Callable[[int, int, set[str]], ActedStep | None]
# Further rounds of a step take the questions, and the seeds, of a step far beyond the end of any run.
FAR = 1_000_000


def round_questions(task: Task, step: int, number: int, wanted: int, asked: set[str]) -> TaskBatch | None:
    """At most ``wanted`` questions for round ``number`` of ``step``, none of them ``asked``; None where none are left.

    Raises:
        ValueError: the task has no question for the step.
    """
    batch = task.training(step + number * FAR, wanted)
    if not batch.questions:
        raise ValueError(f"task: expected at least one question for training step {step}, got none")
    new = [question for question in batch.questions if question.id not in asked]
    return TaskBatch(new, batch.tool) if new else None


def collect(act_round: ActRound, wanted: int, credit: CreditConfig) -> ActedStep:
    """Rollouts of ``wanted`` informative groups, of fewer where the rounds end before.

    Groups are kept in the order they were sampled in and numbered from 0; ``sampled`` of the result holds all, its
    ``metrics`` are ``sampling_rounds`` and ``replaced_groups``. Without replacement (``sampling_rounds`` 1) the result
    is round 0, and so it is, with nothing to train on, where no round had an informative group.
    """
    first = act_round(0, wanted, set())
    assert first is not None
    if credit.sampling_rounds == 1:
        return first
    rounds = [first]
    kept = [informative_groups(rounds[0].rewards, rounds[0].groups, credit)]
    asked = {question.id for question in rounds[0].questions}
    for number in range(1, credit.sampling_rounds):
        missing = wanted - sum(map(len, kept))
        if missing <= 0:
            break
        acted = act_round(number, missing, asked)
        if acted is None:  # this round drew only questions that were asked already
            continue
        rounds.append(acted)
        asked |= {question.id for question in acted.questions}
        kept.append(informative_groups(acted.rewards, acted.groups, credit))
    sampled = _joined(rounds, [list(dict.fromkeys(acted.groups.tolist())) for acted in rounds])
    chosen = _first_of(kept, wanted)
    step = _joined(rounds, chosen) if any(chosen) else first
    replaced = len(np.unique(sampled.groups)) - sum(map(len, chosen))
    metrics = {**first.metrics, "sampling_rounds": len(rounds), "replaced_groups": replaced}
    # The oldest rollouts decide what the update takes as the old policy.
    staleness = max(acted.staleness for acted in rounds)
    return replace(step, seconds=sampled.seconds, staleness=staleness, sampled=sampled, metrics=metrics)


def _first_of(kept: list[list[int]], wanted: int) -> list[list[int]]:
    """The first ``wanted`` labels over all rounds."""
    chosen = []
    for labels in kept:
        chosen.append(labels[:wanted])
        wanted -= len(chosen[-1])
    return chosen


def _joined(rounds: list[ActedStep], chosen: list[list[int]]) -> ActedStep:
    """The rows of the chosen groups, group by group, renumbered; seconds of all rounds added up."""
    rows: list[tuple[ActedStep, int]] = []
    numbers: list[int] = []
    for acted, labels in zip(rounds, chosen, strict=True):
        for label in labels:
            number = numbers[-1] + 1 if numbers else 0
            members = np.flatnonzero(acted.groups == label).tolist()
            rows += [(acted, i) for i in members]
            numbers += [number] * len(members)
    return ActedStep(
        [acted.questions[i] for acted, i in rows],
        [acted.rollouts[i] for acted, i in rows],
        np.array([acted.rewards[i] for acted, i in rows]),
        np.array(numbers),
        [acted.with_experience[i] for acted, i in rows],
        {key: sum(acted.seconds.get(key, 0.0) for acted in rounds) for key in rounds[0].seconds},
    )
