"""Rollouts ahead: which weights make which step, whatever the timing; and runs that stay exact across a restart."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.record import Rollout
from hiexp.io import read_jsonl
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import TIME_KEYS, read_metrics
from hiexp.rl.staleness import RolloutsAhead, policy_step
from hiexp.rl.trainer import GRPOTrainer


class Worker:
    """Remembers the weights it has; its rollouts are (step, policy step, weights)."""

    def __init__(self):
        self.weights, self.log = None, []

    def load(self, weights):
        self.weights = weights["after"]
        self.log.append(("load", self.weights))
        return {"loaded": self.weights}

    def sample(self, step, policy):
        self.log.append(("sample", step))
        return [(step, policy, self.weights)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 12), st.sampled_from([None, "evaluate"]))
def test_the_rule_holds_at_every_step_and_over_a_restart(lag, last, stop, between):
    worker = Worker()
    ahead = RolloutsAhead(worker.sample, worker.load, lag, last)
    ahead.begin(0, {"after": 0}, {})
    for step in range(1, last + 1):
        rollouts, metrics = ahead.take(step)
        expected = max(0, step - 1 - lag)
        assert rollouts == [(step, expected, expected)]
        assert metrics == {"loaded": expected}
        assert step - 1 - policy_step(step, lag) <= lag
        ahead.updated(step, {"after": step})
        if between:
            assert ahead.run(lambda worker=worker: worker.weights) == step
        if step == stop:
            stored = ahead.pending(step)
            ahead.close()
            worker = Worker()
            ahead = RolloutsAhead(worker.sample, worker.load, lag, last)
            ahead.begin(step, {"after": step}, stored)
    ahead.close()
    assert [entry for entry in worker.log if entry[0] == "sample" and entry[1] > last] == []


def test_work_goes_on_while_the_trainer_is_busy():
    begun, leave = threading.Event(), threading.Event()

    def sample(step, policy):
        if step == 3:
            begun.set()
            assert leave.wait(10)
        return [step]

    ahead = RolloutsAhead(sample, lambda weights: {}, 1, 5)
    ahead.begin(0, {}, {})
    assert ahead.take(1)[0] == [1]
    ahead.updated(1, {})
    assert begun.wait(10)  # step 3 is being made while the trainer has not even taken step 2
    leave.set()
    assert ahead.take(2)[0] == [2]
    assert ahead.take(3)[0] == [3]
    ahead.close()


def test_a_failure_in_the_worker_reaches_the_trainer():
    def load(weights):
        raise OSError("no such device")

    ahead = RolloutsAhead(lambda step, policy: [], load, 1, 5)
    ahead.begin(0, {}, {})
    with pytest.raises(OSError, match="no such device"):
        ahead.take(1)
    with pytest.raises(OSError, match="no such device"):
        ahead.run(lambda: None)
    ahead.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_run_whose_end_is_moved_goes_on_from_its_last_weights(lag, first, back, more, stop):
    """The end is moved at step ``first - back``; a restart ``stop`` steps later changes nothing."""
    begin = max(0, first - back)
    log, stored = {}, {}
    for last, start, end in ((first, 0, begin), (first + more, begin, begin + stop), (first + more, begin + stop, 99)):
        worker = Worker()
        ahead = RolloutsAhead(worker.sample, worker.load, lag, last)
        ahead.begin(start, {"after": start}, stored)
        for step in range(start + 1, min(end, last) + 1):
            ((log[step],), _) = ahead.take(step)
            ahead.updated(step, {"after": step})
        stored = ahead.pending(min(end, last))
        ahead.close()
    for step, (made_for, policy, weights) in log.items():
        planned = step <= min(begin + lag, first)
        expected = policy_step(step, lag) if planned else max(begin, policy_step(step, lag))
        assert (made_for, policy, weights) == (step, expected, expected)
    assert sorted(log) == list(range(1, first + more + 1))


def test_a_lag_below_one_is_refused():
    with pytest.raises(ValueError, match="lag: expected at least 1, got 0"):
        RolloutsAhead(lambda step, policy: [], lambda weights: {}, 0, 9)


def train(tiny_run, path, steps, lag, **stages):
    run = {"steps": steps, "checkpoint_every": 1, "keep_last": 9}
    settings = tiny_run.config(path, run=run, rollout={"staleness": lag}, evaluation={"every": 2}, **stages)
    trainer = GRPOTrainer(TrainConfig.from_dict(settings))
    trainer.train()
    return trainer


def read_rollouts(path, step):
    return [Rollout.from_json(row) for _, row in read_jsonl(path / "rollouts" / f"step_{step:06d}.jsonl.gz")]


def weights(path, step):
    from safetensors.torch import load_file

    return load_file(path / "checkpoints" / f"step_{step:06d}" / "model" / "model.safetensors")


def test_rollouts_come_from_the_weights_the_rule_names(tiny_run, tmp_path):
    """Every sampled token has the log-probability that the checkpoint of its policy step gives it."""
    from transformers import AutoModelForCausalLM

    from hiexp.rl.weight_sync import sequence_logprobs

    path = tmp_path / "run"
    train(tiny_run, path, 4, 1)
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert all(row["sync_gap_max"] == 0.0 for row in rows)
    for step in (3, 4):
        rollouts = read_rollouts(path, step)
        assert {rollout.policy_step for rollout in rollouts} == {step - 2}
        gaps = {}
        for policy in (step - 2, step - 1):
            folder = path / "checkpoints" / f"step_{policy:06d}" / "model"
            model = AutoModelForCausalLM.from_pretrained(folder)
            gaps[policy] = max(
                np.abs(
                    (sequence_logprobs(model, one.token_ids) - one.logprobs[1:]) * np.asarray(one.loss_mask[1:])
                ).max()
                for one in rollouts
            )
        assert gaps[step - 2] < 1e-4 < gaps[step - 1]


def test_a_continued_run_ends_like_an_uninterrupted_one(tiny_run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_run, whole, 4, 2)
    trainer = GRPOTrainer(
        TrainConfig.from_dict(
            tiny_run.config(
                cut, run={"steps": 4, "checkpoint_every": 1, "keep_last": 9}, rollout={"staleness": 2},
                evaluation={"every": 2},
            )
        )
    )  # fmt: skip

    class StopError(Exception):
        pass

    def stop(kind, row):
        if kind == "step" and row["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        trainer.train(stop)
    assert sorted(path.name for path in (cut / "checkpoints" / "step_000002" / "ahead").iterdir()) == [
        "step_000003.jsonl.gz", "step_000004.jsonl.gz",
    ]  # fmt: skip
    train(tiny_run, cut, 4, 2)

    def rows(path):
        return [
            {key: value for key, value in row.items() if key not in TIME_KEYS}
            for row in read_metrics(path / "metrics.jsonl")
        ]

    assert rows(cut) == rows(whole)
    for name, tensor in weights(whole, 4).items():
        assert torch.equal(tensor, weights(cut, 4)[name])
    for name in ("step_000002.json", "step_000004.json"):
        assert (cut / "eval" / name).read_bytes() == (whole / "eval" / name).read_bytes()


def test_steps_can_be_raised_at_the_end(tiny_run, tmp_path):
    """The steps that nobody had planned begin like a run does: with the newest weights, then up to the lag."""
    path = tmp_path / "run"
    for steps in (3, 4, 7):
        train(tiny_run, path, steps, 2)
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 2, 0, 0, 1, 2]
    for step, row in enumerate(rows, start=1):
        assert {one.policy_step for one in read_rollouts(path, step)} == {step - 1 - row["staleness"]}


def test_ratios_of_stale_rollouts_are_not_one(tiny_run, tmp_path):
    path = tmp_path / "run"
    train(tiny_run, path, 3, 2, algorithm={"lr": 1e-2, "kl_coef": 0.0})
    rows = read_metrics(path / "metrics.jsonl")
    assert rows[0]["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert rows[2]["staleness"] == 2
    assert rows[2]["approx_kl"] > 1e-4
