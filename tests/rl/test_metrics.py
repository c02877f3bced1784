"""Metrics: their definitions on small hand-made groups, and a log that forgets what a checkpoint forgot."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from hiexp.agent.record import Injection, Rollout, ToolCall
from hiexp.io import DataError
from hiexp.rl.metrics import (
    METRIC_KEYS,
    SERVICE_KEYS,
    MetricsLog,
    ServiceCounts,
    read_metrics,
    reward_metrics,
    rollout_metrics,
)


def make_rollout(finish, calls=(), injections=(), sampled=2, inserted=3):
    mask = [0] * inserted + [1] * sampled
    return Rollout(
        "q/0/0", "q", "?", [1] * len(mask), mask, [0.0] * len(mask), [], list(injections), list(calls), None, 0, 0,
        "hiexp", finish, None,
    )  # fmt: skip


def test_reward_metrics_by_hand():
    rewards = np.array([1.0, 0.0, 0.5, 0.5, np.nan, 1.0])
    groups = np.array([7, 7, -2, -2, 3, 3])
    metrics = reward_metrics(rewards, groups, [True, False, True, True, False, False])
    assert metrics["reward_mean"] == pytest.approx(0.6)
    assert metrics["advantage_var_raw"] == pytest.approx((0.25 + 0.25) / 5)
    assert metrics["zero_variance_share"] == pytest.approx(2 / 3)
    assert metrics["nan_rewards"] == 1
    assert metrics["reward_with_experience"] == pytest.approx(2 / 3)
    assert metrics["reward_without_experience"] == pytest.approx(0.5)


def test_arms_that_do_not_exist_are_null():
    metrics = reward_metrics(np.array([1.0, 0.0]), np.array([0, 0]), [False, False])
    assert metrics["reward_with_experience"] is None
    assert reward_metrics(np.array([np.nan]), np.array([0]), [False])["reward_mean"] is None


def test_rollout_metrics_by_hand():
    ok, failed = ToolCall(1, "a", "ok", 0.1), ToolCall(2, "b", "timeout", 9.0)
    start, e1 = Injection("x", 1, "E2", 0.5, 0, 0, 1), Injection("y", 1, "E1", 0.9, 1, 1, 2)
    again = ToolCall(1, "a", "duplicate", 0.0)
    rollouts = [
        make_rollout("answer", [ok, failed], [start, e1]),
        make_rollout("max_turns", [again], [], sampled=4),
        make_rollout("answer", [ok], []),
    ]
    rollouts[2].engine_restarts = 2
    metrics = rollout_metrics(rollouts, [True, True, False])
    assert metrics["searches_per_answer"] == pytest.approx(4 / 3)
    assert (metrics["tool_errors"], metrics["duplicate_searches"], metrics["engine_restarts"]) == (1, 1, 2)
    assert metrics["response_tokens"] == pytest.approx(8 / 3)
    assert metrics["prompt_tokens"] == 3
    assert metrics["experience_hit_rate_start"] == 0.5
    assert metrics["experience_hit_rate_E1"] == pytest.approx(1 / 3)
    assert (metrics["finish_answer"], metrics["finish_max_turns"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert metrics["tool_errors"] == 1
    assert set(metrics) <= set(METRIC_KEYS)


def test_what_tool_and_scorer_count_is_told_from_now_on():
    server = SimpleNamespace(client=SimpleNamespace(retried=3), empty_passages=2)
    task = SimpleNamespace(scorer_failures=5)
    counts = ServiceCounts(SimpleNamespace(tool=SimpleNamespace(tool=server)), task)
    assert counts.read() == dict.fromkeys(SERVICE_KEYS, 0)
    server.client.retried, server.empty_passages, task.scorer_failures = 7, 3, 6
    assert counts.read() == {"tool_retries": 4, "empty_passages": 1, "scorer_failures": 1}
    assert ServiceCounts(SimpleNamespace(), object()).read() == dict.fromkeys(SERVICE_KEYS, 0)
    assert set(SERVICE_KEYS) <= set(METRIC_KEYS)


def test_levels_lengths_and_truncation_by_hand():
    e2, e3 = (Injection("x", 1, level, 0.5, 0, 0, 1) for level in ("E2", "E3"))
    lost = Injection("z", 1, "E2", 0.5, 0, 0, 0, 0.8)
    rollouts = [
        make_rollout("answer", [], [e2, e3], sampled=3),
        make_rollout("max_tokens", [], [e3], sampled=8),
        make_rollout("context", [], [], sampled=1),
        make_rollout("answer", [], [], sampled=2),
    ]
    rollouts[0].dropped = [lost]
    metrics = rollout_metrics(rollouts, [True, True, True, False])
    assert metrics["experience_hit_rate_E2"] == pytest.approx(1 / 3)
    assert metrics["experience_hit_rate_E3"] == pytest.approx(2 / 3)
    assert metrics["experience_dropped"] == pytest.approx(1 / 4)
    assert metrics["response_tokens_max"] == 8
    assert metrics["truncated_share"] == 0.5


def test_uplift_compares_within_groups():
    # The hard question has more controls: a comparison over groups would give another number.
    rewards = np.array([1.0, 0.8, 0.2, 0.2, 0.0, np.nan, 0.5, 0.5])
    groups = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    allowed = [True, False, True, False, False, True, True, True]
    metrics = reward_metrics(rewards, groups, allowed)
    differences = [0.2, 0.2 - 0.1]
    assert metrics["uplift"] == pytest.approx(np.mean(differences))
    assert metrics["uplift_stderr"] == pytest.approx(np.std(differences, ddof=1) / np.sqrt(2))
    alone = reward_metrics(rewards[:2], groups[:2], allowed[:2])
    assert (alone["uplift"], alone["uplift_stderr"]) == (pytest.approx(0.2), None)
    assert reward_metrics(rewards, groups, [True] * 8)["uplift"] is None


def test_metrics_of_a_registered_loss_are_kept(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    assert list(log.append({"step": 1, "loss/bounded": 0.5})) == [*METRIC_KEYS, "loss/bounded"]
    assert read_metrics(log.path)[0]["loss/bounded"] == 0.5


def test_log_keeps_key_order_and_forgets_later_steps(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        assert list(log.append({"step": step, "reward_mean": step / 2, "lr": 0.1})) == list(METRIC_KEYS)
    with open(log.path, "a") as stream:
        stream.write('{"step": 4, "rew')
    resumed = MetricsLog(tmp_path, resume_step=2)
    assert [row["step"] for row in resumed.rows] == [1, 2]
    resumed.append({"step": 3, "reward_mean": 9.0})
    assert [(row["step"], row["reward_mean"]) for row in read_metrics(log.path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_nan_never_reaches_the_file(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    with pytest.raises(ValueError, match="JSON"):
        log.append({"step": 1, "loss": float("nan")})
    assert read_metrics(log.path) == []


def test_malformed_line_inside_the_log_names_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_full_disk_names_the_log_and_a_half_written_line_is_dropped_on_resume(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, resume_step=0)
    log.append({"step": 1})

    def full(descriptor):
        log.path.write_bytes(log.path.read_bytes()[:-9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"make room and run the same command again.*metrics.jsonl'"):
            log.append({"step": 2})
    again = MetricsLog(tmp_path, resume_step=1)
    assert [row["step"] for row in again.rows] == [1]
    again.append({"step": 2})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]
