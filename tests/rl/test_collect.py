"""Dynamic sampling: it never keeps a group that teaches nothing, stops at its bound, and is the same when repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.record import Rollout
from hiexp.rl.act import ActedStep
from hiexp.rl.collect import FAR, collect, round_questions
from hiexp.rl.config import CreditConfig, TrainConfig
from hiexp.rl.reward import QuestionTask, TaskBatch
from hiexp.rl.trainer import GRPOTrainer
from hiexp.tasks.question import Question
from hiexp.tasks.scorers import Scorer

SIZE = 3


def make_round(number, wanted, asked, share, seed=0):
    """A round of ``wanted`` groups; a share of them has rewards that differ."""
    rng = np.random.default_rng([seed, number])
    questions, rollouts, rewards = [], [], []
    for g in range(wanted):
        question = Question(f"{number}/{g}", "?", ("a",))
        assert question.id not in asked
        mixed = rng.random() < share
        for i in range(SIZE):
            name = f"{question.id}/{i}"
            questions.append(question)
            rollouts.append(
                Rollout(name, question.id, "?", [1, 2], [0, 1], [0, 0], [], [], [], None, 0, 0, "h", "answer", "a")
            )
            rewards.append(float(i == 0) if mixed else 1.0)
    groups = np.repeat(np.arange(wanted), SIZE)
    return ActedStep(questions, rollouts, np.array(rewards), groups, [True] * len(rollouts), {"seconds_rollout": 1.0})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.floats(0, 1), st.integers(0, 99))
def test_what_is_kept(wanted, rounds, share, seed):
    calls = []

    def act(number, count, asked):
        calls.append((number, count))
        return make_round(number, count, asked, share, seed)

    step = collect(act, wanted, CreditConfig(sampling_rounds=rounds))
    counts = [number for number, _ in calls]
    assert counts == list(range(len(calls)))
    assert len(calls) <= rounds
    everything = step.sampled
    assert len(everything.rollouts) == SIZE * sum(count for _, count in calls)
    assert step.metrics["sampling_rounds"] == len(calls)
    assert step.seconds == {"seconds_rollout": float(len(calls))}
    mixed = [g for g in np.unique(everything.groups) if np.ptp(everything.rewards[everything.groups == g])]
    if mixed:
        # Never a group without variance, as many as were found, never more than wanted, whole groups in order.
        for g in np.unique(step.groups):
            assert np.ptp(step.rewards[step.groups == g]) > 0
            assert (step.groups == g).sum() == SIZE
        assert len(np.unique(step.groups)) == min(wanted, len(mixed))
        assert step.groups.tolist() == np.repeat(np.arange(len(step.groups) // SIZE), SIZE).tolist()
        if len(calls) < rounds:
            assert len(mixed) >= wanted
    assert len({rollout.rollout_id for rollout in step.rollouts}) == len(step.rollouts)
    for rollout, question in zip(step.rollouts, step.questions, strict=True):
        assert rollout.question_id == question.id


def test_without_replacement_the_round_is_the_step():
    first = make_round(0, 4, set(), 0.5)
    assert collect(lambda *_: first, 4, CreditConfig()) is first


def test_where_nothing_is_informative_the_first_round_is_returned():
    step = collect(lambda n, count, asked: make_round(n, count, asked, 0.0), 2, CreditConfig(sampling_rounds=3))
    assert [question.id for question in step.questions[::SIZE]] == ["0/0", "0/1"]
    assert step.metrics == {"sampling_rounds": 3, "replaced_groups": 6}


def test_it_ends_where_no_questions_are_left():
    def act(number, wanted, asked):
        return None if number else make_round(0, wanted, asked, 0.0)

    assert collect(act, 2, CreditConfig(sampling_rounds=9)).metrics["sampling_rounds"] == 1


def test_further_rounds_ask_other_questions_and_the_same_ones_when_repeated():
    task = QuestionTask([Question(f"q{i}", "?", ("a",)) for i in range(6)], [], Scorer(), 0)
    first = round_questions(task, 3, 0, 2, set())
    assert [q.id for q in first.questions] == [q.id for q in task.training(3, 2).questions]
    asked = {question.id for question in first.questions}
    for number in range(1, 5):
        batch = round_questions(task, 3, number, 2, asked)
        again = round_questions(task, 3, number, 2, asked)
        assert (batch is None) == (again is None)
        if batch is not None:
            assert [q.id for q in batch.questions] == [q.id for q in again.questions]
            assert not asked & {question.id for question in batch.questions}
    assert round_questions(task, 3, 1, 2, {f"q{i}" for i in range(6)}) is None


def test_a_step_without_questions_is_named():
    class Empty:
        def training(self, step, count):
            return TaskBatch([])

    with pytest.raises(ValueError, match="task: expected at least one question for training step 7, got none"):
        round_questions(Empty(), 7, 0, 2, set())


class EasyTask:
    """Every second question is answered right by everybody."""

    def __init__(self):
        self.asked = []

    def training(self, step, count):
        self.asked.append((step, count))
        return TaskBatch([Question(f"{step}-{i}", "colour of sky ?", ("red",)) for i in range(count)])

    def evaluation(self):
        return []

    def score(self, question, answer):
        return {"em": 1.0 if int(question.id[-1]) % 2 else float(answer == "red")}


def test_a_run_replaces_groups_and_a_continued_run_equals_it(tiny_run, tmp_path):
    from hiexp.io import read_jsonl
    from hiexp.rl.metrics import TIME_KEYS, read_metrics

    def config(name, steps):
        return TrainConfig.from_dict(
            tiny_run.config(tmp_path / name, credit={"sampling_rounds": 3}, rollout={"group_size": 4},
                            run={"steps": steps, "checkpoint_every": 1, "questions_per_step": 2})
        )  # fmt: skip

    task = EasyTask()
    GRPOTrainer(config("whole", 2), task=task).train()
    assert [step for step, _ in task.asked if step > FAR]
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["sampling_rounds"] >= 2 and row["replaced_groups"] >= 1 for row in rows)
    stored = list(read_jsonl(tmp_path / "whole" / "rollouts" / "step_000001.jsonl.gz"))
    assert len(stored) > 8
    GRPOTrainer(config("parts", 1), task=EasyTask()).train()
    GRPOTrainer(config("parts", 2), task=EasyTask()).train()
    again = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    strip = [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in rows]
    assert strip == [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in again]


def test_a_data_set_of_one_question(tiny_run, tmp_path):
    task = QuestionTask([Question("only", "colour of sky ?", ("red",))], [], Scorer(), 0)
    config = TrainConfig.from_dict(
        tiny_run.config(tmp_path / "run", credit={"sampling_rounds": 3}, rollout={"group_size": 4},
                        run={"steps": 2, "questions_per_step": 1})
    )  # fmt: skip
    last = GRPOTrainer(config, task=task).train()
    assert last["step"] == 2
    assert last["sampling_rounds"] == 1


def test_a_round_of_questions_already_asked_does_not_end_the_search():
    def act_round(number, wanted, asked):
        return None if number == 1 else make_round(number, wanted, asked, share=0.0 if number == 0 else 1.0)

    step = collect(act_round, 4, CreditConfig(sampling_rounds=3))
    assert len(np.unique(step.groups)) == 4
