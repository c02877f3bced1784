"""Trackers: what they are told, what they forget on a restart, which run they go on with, and bad names."""

from __future__ import annotations

import json

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import MetricsLog, read_metrics
from hiexp.rl.trackers import Trackers, check_trackers
from hiexp.rl.trainer import GRPOTrainer


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def open_log(path, names, step):
    return MetricsLog(path, resume_step=step, trackers=Trackers(names, path, {"run": {"seed": 1}}, step))


def test_tensorboard_holds_the_numbers_and_forgets_what_was_undone(tmp_path):
    log = open_log(tmp_path, ["tensorboard"], 0)
    log.append({"step": 1, "reward_mean": 0.25, "snapshot_id": "abc"})
    log.publish("eval_with_hek", {"f1": 0.5}, 1)
    log.append({"step": 2, "reward_mean": 0.5})
    log.close()
    resumed = open_log(tmp_path, ["tensorboard"], 1)
    resumed.append({"step": 2, "reward_mean": 0.75})
    resumed.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "hiexp")).Reload()
    assert [event.value for event in events.Scalars("train/reward_mean")] == [0.25, 0.75]
    assert [event.value for event in events.Scalars("eval_with_hek/f1")] == [0.5]
    assert [row["snapshot_id"] for row in read_metrics(log.path)] == ["abc", None]


class Recorder(GeneralTracker):
    """Stands in for W&B: keeps what it is told, run by run."""

    name, requires_logging_directory, tracker = "wandb", False, None
    opened: list = []  # noqa: RUF012 - shared by all, on purpose

    def __init__(self, project, **settings):
        super().__init__(_blank=True)
        self.opened.append({"project": project, **settings, "logged": [], "ended": False})

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.opened[-1]["config"] = values

    def log(self, values, step=None, **kwargs):
        self.opened[-1]["logged"].append((step, values))

    def finish(self):
        self.opened[-1]["ended"] = True


def test_a_restart_goes_on_with_the_same_tracker_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr("hiexp.rl.trackers.check_trackers", lambda names: None)
    monkeypatch.setattr(Recorder, "opened", [])
    for steps in (1, 2):
        config = tiny_run.config(tmp_path / "run", run={"steps": steps, "trackers": ["wandb"]})
        GRPOTrainer(TrainConfig.from_dict(config)).train()
    first, second = Recorder.opened
    assert first["id"] == second["id"]
    assert first["id"] == json.loads((tmp_path / "run" / "trackers.json").read_text())["run_id"]
    assert second["resume"] == "allow"
    assert first["config"]["run"]["steps"] == 1
    steps = [[step for step, values in run["logged"] if "train/reward_mean" in values] for run in (first, second)]
    assert steps == [[1], [2]]
    assert first["ended"]
    assert second["ended"]
    # The same numbers as in the file, which stays the truth.
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    train = next(values for step, values in first["logged"] if "train/lr" in values)
    assert train == {f"train/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        log = open_log(tmp_path, ["wandb"], step - 1)
        log.append({"step": step, "reward_mean": 0.5})
        log.close()
    identifier = json.loads((tmp_path / "trackers.json").read_text())["run_id"]
    files = list(tmp_path.rglob(f"run-{identifier}.wandb"))
    assert len(files) == 2
    assert all(path.stat().st_size > 0 for path in files)


def test_names_are_checked_before_anything_is_written(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"run.trackers: expected names among .*tensorboard.*; got 'tensorbord'"):
        check_trackers(["tensorbord"])
    with pytest.raises(ImportError, match="swanlab is not installed; run: pip install swanlab"):
        check_trackers(["swanlab"])
    config = tiny_run.config(tmp_path / "run", run={"trackers": ["tensorbord"]})
    with pytest.raises(ValueError, match=r"run\.trackers"):
        GRPOTrainer(TrainConfig.from_dict(config))
    assert not (tmp_path / "run").exists()
