"""Alarms: each is triggered by its cause and by nothing else, is told once, stored, and may stop the run."""

from __future__ import annotations

import os

import numpy as np
import pytest

from hiexp.report.runs import load_runs
from hiexp.rl import commands
from hiexp.rl.alarms import Alarm, AlarmError, AlarmLog, blind, raised, read_alarms
from hiexp.rl.config import ALARMS, AlarmConfig, TrainConfig
from hiexp.rl.metrics import read_metrics
from hiexp.rl.reward import TaskBatch
from hiexp.rl.trainer import GRPOTrainer
from hiexp.tasks.question import Question

HEALTHY = {
    "reward_mean": 0.4, "zero_variance_share": 0.5, "nan_rewards": 0, "kl_ref": 0.01, "approx_kl": 0.001,
    "entropy": 1.0, "engine_mismatch": 0.001, "engine_mismatch_share": 0.0, "staleness": 0, "trained_tokens": 100,
    "response_tokens": 9.0,
}  # fmt: skip
CONFIG = AlarmConfig()


def rows_of(*changes, healthy=6):
    rows = [HEALTHY] * healthy + [{**HEALTHY, **change} for change in changes]
    return [{"step": step, **row} for step, row in enumerate(rows, start=1)]


def test_a_healthy_run_is_silent():
    rows = rows_of(healthy=20)
    assert all(raised(rows[:n], CONFIG) == [] for n in range(21))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kl", {"kl_ref": 1.5}, r"KL explosion: 1.5 nats per token from the starting model \(kl_ref\), bound 1 "),
        ("kl", {"approx_kl": 2.0}, r"KL explosion: 2 nats per token from the policy that acted"),
        ("entropy", {"entropy": 0.09}, r"entropy collapse: 0.09 nats per token, bound 0.1, which is 0.1 of the first"),
        ("mask", {"response_tokens": 0.0}, "mask covers everything: no rollout has a sampled token"),
        ("mask", {"trained_tokens": None}, "mask covers everything: 50% of the groups differ in reward"),
        ("mismatch", {"engine_mismatch": 0.2}, "log-probs differ by 0.2 nats on average, bound 0.1"),
        ("mismatch", {"engine_mismatch_share": 0.3}, "log-probs of 30.0% of the tokens differ by more than 0.1 nats"),
        ("nan_reward", {"nan_rewards": 3}, "NaN reward: 3 rollouts were left out"),
    ],
)
def test_each_alarm_begins_once_and_may_come_again(name, change, message):
    rows = rows_of(change, change, {}, change)
    found = [raised(rows[:n], CONFIG) for n in range(1, len(rows) + 1)]
    assert [len(alarms) for alarms in found] == [0] * 6 + [1, 0, 0, 1]
    (alarm,) = found[6]
    assert (alarm.step, alarm.name) == (7, name)
    assert name in ALARMS
    import re

    assert re.search(message, alarm.message)


def test_degenerate_needs_its_steps_in_a_row():
    flat = {"zero_variance_share": 1.0, "trained_tokens": None}
    rows = rows_of(flat, flat, {}, *[flat] * 6)
    found = [alarm for n in range(1, len(rows) + 1) for alarm in raised(rows[:n], CONFIG)]
    assert [(alarm.step, alarm.name) for alarm in found] == [(14, "degenerate")]
    assert "for 5 steps" in found[0].message
    assert "easier questions" in found[0].message


def test_stale_rollouts_and_missing_values_raise_nothing():
    assert raised(rows_of({"engine_mismatch": 9.0, "staleness": 2}), CONFIG) == []
    assert raised(rows_of(dict.fromkeys(HEALTHY) | {"zero_variance_share": 1.0}), CONFIG) == []
    assert raised([{"step": 1}], CONFIG) == []


def test_the_log_keeps_and_forgets(tmp_path):
    log = AlarmLog(tmp_path, AlarmConfig(stop=("kl",)))
    log.rewind(0)
    rows = rows_of({"kl_ref": 3.0}, {"nan_rewards": 1})
    assert log.check(rows[:6]) == []
    assert not log.path.exists()
    (first,), (second,) = log.check(rows[:7]), log.check(rows)
    assert log.stopping([first]) == [first]
    assert log.stopping([second]) == []
    assert read_alarms(tmp_path) == [first, second]
    with open(log.path, "a") as stream:
        stream.write('{"step": 9, "na')
    log.rewind(7)
    assert read_alarms(tmp_path) == [first]
    assert str(AlarmError([first])).startswith("step 7: stopped by alarm (alarms.stop): KL explosion")


class FlatTask:
    def training(self, step, count):
        return TaskBatch([Question(f"{step}/{i}", "colour of sky ?", ("red",)) for i in range(count)])

    def evaluation(self):
        return []

    def score(self, question, answer):
        return {"em": 0.0}


def test_a_run_stops_after_a_checkpoint_and_goes_on(tiny_run, tmp_path, capsys):
    config = TrainConfig.from_dict(
        tiny_run.config(tmp_path / "run", alarms={"degenerate_steps": 2, "stop": ["degenerate"]},
                        run={"steps": 3, "checkpoint_every": 100, "questions_per_step": 1})
    )  # fmt: skip
    trainer = GRPOTrainer(config, task=FlatTask())
    with pytest.raises(AlarmError, match=r"step 2: stopped by alarm .* all groups degenerate: for 2 steps"):
        trainer.train(commands.report)
    assert "ALARM at step 2: all groups degenerate" in capsys.readouterr().out
    assert trainer.checkpoints.steps() == [2]
    GRPOTrainer(config, task=FlatTask()).train()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    (alarm,) = read_alarms(tmp_path / "run")
    assert isinstance(alarm, Alarm)
    (run,) = load_runs([tmp_path / "run"])
    assert any(note.startswith("alarm at step 2: all groups degenerate") for note in run.notes)


def test_nan_rewards_raise_the_alarm(tiny_run, tmp_path):
    class NanTask(FlatTask):
        def score(self, question, answer):
            return {"em": float("nan") if answer is not None else float(np.random.default_rng(0).random())}

    config = tiny_run.config(tmp_path / "run", algorithm={"nan_reward": "zero"}, run={"steps": 1})
    GRPOTrainer(TrainConfig.from_dict(config), task=NanTask()).train()
    assert "nan_reward" in [alarm.name for alarm in read_alarms(tmp_path / "run")]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"algorithm": {"kl_coef": 0.0}}, ["kl"]),
        ({"algorithm": {"kl_coef": 0.0, "minibatches": 2}}, []),
        ({"algorithm": {"kl_coef": 0.0, "old_logprobs": "engine"}}, []),
        ({"algorithm": {"kl_coef": 0.0}, "rollout": {"staleness": 1}}, ["mismatch"]),
        ({"algorithm": {"kl_coef": 0.0, "importance_cap": 2.0}, "rollout": {"staleness": 1}}, ["kl", "mismatch"]),
    ],
)
def test_alarms_that_can_never_ring_are_told(settings, names):
    told = blind(TrainConfig.from_dict(settings))
    assert [sentence.split()[1] for sentence in told] == names
    assert all("has nothing to look at" in sentence for sentence in told)


def test_a_full_disk_names_the_log(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"make room and run the same command again.*alarms.jsonl'"):
        AlarmLog(tmp_path, CONFIG).check(rows_of({"kl_ref": 9.0}))
