"""Exact resume: a run killed at any moment and started again ends like one that was never touched, bit for bit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hiexp.rl.checkpoint import Checkpoints
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import TIME_KEYS, read_metrics
from hiexp.rl.preemption import Preempted, watched
from hiexp.rl.trainer import GRPOTrainer

WORKER = str(Path(__file__).with_name("resume_worker.py"))
KILLED = -9


def start(config, kill_at_flush=None, kill_at_event=None):
    # A fork server has torch loaded, so a run starts in a tenth of a second instead of several.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiexp.rl.trainer", "hiexp.agent.bm25"])
    names = {"CONFIG": config, "KILL_AT_FLUSH": kill_at_flush, "KILL_AT_EVENT": kill_at_event}
    process = context.Process(target=runpy.run_path, args=(WORKER, names))
    process.start()
    return process


def finish(config, kill_at_flush=None, kill_at_event=None):
    process = start(config, kill_at_flush, kill_at_event)
    process.join(120)
    return process.exitcode


def contents(run_dir):
    """Everything of a run that config and seed decide."""
    run_dir = Path(run_dir)
    rows = [{key: row[key] for key in row if key not in TIME_KEYS} for row in read_metrics(run_dir / "metrics.jsonl")]
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for pattern in ("checkpoints/*/model/*", "checkpoints/*/*.json", "checkpoints/*/*.pt", "eval/*", "tokenizer/*")
        for path in sorted(run_dir.glob(pattern))
    }
    rollouts = sorted(path.name for path in (run_dir / "rollouts").iterdir())
    return rows, files, rollouts


@pytest.fixture(scope="module")
def untouched(tiny_run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    config = tiny_run.config(run_dir, run={"steps": 4}, evaluation={"every": 2})
    assert finish(config) == 0
    return contents(run_dir)


def killed_config(tiny_run, tmp_path):
    return tiny_run.config(tmp_path / "run", run={"steps": 4}, evaluation={"every": 2})


def test_the_run_trains_something(untouched):
    rows, files, rollouts = untouched
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert any(row["grad_norm"] for row in rows)
    assert (
        files["checkpoints/step_000002/model/model.safetensors"]
        != files["checkpoints/step_000004/model/model.safetensors"]
    )
    assert len(rollouts) == 4


def test_killed_at_flushes_and_continued(tiny_run, tmp_path, untouched):
    """Every write ends in a flush; killing before it covers the moments inside checkpoint and metrics writes."""
    config = killed_config(tiny_run, tmp_path)
    kills = 0
    # Each attempt gets further than the one before, so the run also has to continue from what several kills left.
    for flush in itertools.count(start=0, step=9):
        code = finish(config, flush)
        if code == 0:
            break
        assert code == KILLED
        kills += 1
    assert kills >= 3
    assert contents(tmp_path / "run") == untouched
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_killed_at_fifty_random_places_and_continued(tiny_run, tmp_path):
    """While it starts, acts, learns and writes, and in particular inside the writing of a checkpoint."""
    small = {"steps": 2, "checkpoint_every": 1, "questions_per_step": 2}
    stages = {"run": small, "rollout": {"group_size": 3}, "evaluation": {"questions": 0}}
    assert finish(tiny_run.config(tmp_path / "untouched", **stages)) == 0
    expected = contents(tmp_path / "untouched")
    places, kills, runs = random.Random(0), {"train": 0, "save": 0}, 0
    while sum(kills.values()) < 50:
        runs += 1
        config = tiny_run.config(tmp_path / f"run{runs}", **stages)
        code = KILLED
        while code == KILLED:
            place = places.choice(list(kills))
            # From the first rollouts on there are about 120 events, about 50 of them while checkpoints are written.
            code = finish(config, kill_at_event=(place, places.randrange(120 if place == "train" else 30)))
            kills[place] += code == KILLED
        assert code == 0
        assert contents(tmp_path / f"run{runs}") == expected
        assert not list((tmp_path / f"run{runs}").rglob("*.tmp"))
    assert min(kills.values()) >= 10


def test_continues_from_the_checkpoint_before_a_damaged_one(tiny_run, tmp_path, untouched):
    config = killed_config(tiny_run, tmp_path)
    assert finish(config) == 0
    weights = tmp_path / "run" / "checkpoints" / "step_000004" / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    trainer = GRPOTrainer(TrainConfig.from_dict(config))
    with pytest.warns(UserWarning, match="step_000004: damaged checkpoint"):
        trainer.train()
    assert contents(tmp_path / "run") == untouched


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_behind_a_checkpoint(tiny_run, tmp_path, untouched, number):
    config = killed_config(tiny_run, tmp_path)
    trainer = GRPOTrainer(TrainConfig.from_dict(config))

    def listen(kind, row):
        if kind == "step" and row["step"] == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="after step 1, which is checkpointed") as stop:
        trainer.train(listen)
    assert stop.value.step == 1
    assert signal.getsignal(number) == before
    # checkpoint_every is 2: the one of step 1 is there because of the signal.
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [1]
    assert GRPOTrainer(TrainConfig.from_dict(config)).train()["step"] == 4
    assert contents(tmp_path / "run")[0] == untouched[0]


def test_a_second_signal_ends_the_process_at_once():
    pid = os.fork()
    if pid == 0:
        with watched() as preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            if preemption.asked:
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_more_steps_go_on_from_the_end(tiny_run, tmp_path, untouched):
    config = tiny_run.config(tmp_path / "run", run={"steps": 2}, evaluation={"every": 2})
    assert finish(config) == 0
    config["run"]["steps"] = 4
    assert finish(config) == 0
    assert contents(tmp_path / "run") == untouched


def test_a_finished_run_is_left_alone(tiny_run, tmp_path):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1}))
    last = GRPOTrainer(config).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    assert GRPOTrainer(config).train() == last
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")} == before


def test_two_processes_cannot_train_in_one_directory(tiny_run, tmp_path):
    trainer = GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1})))
    with trainer.directory.locked(), pytest.raises(ValueError, match="another process is at work"):
        trainer.train()


def test_another_config_is_refused_with_the_keys_that_differ(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path / "run", run={"steps": 1})
    GRPOTrainer(TrainConfig.from_dict(config)).train()
    config["algorithm"]["lr"], config["run"]["steps"] = 0.5, 2
    with pytest.raises(ValueError, match=r"another config \(algorithm.lr: 0.001 -> 0.5\); restore"):
        GRPOTrainer(TrainConfig.from_dict(config))


def test_a_change_that_was_allowed_by_name_is_written_down(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path / "run", run={"steps": 1})
    GRPOTrainer(TrainConfig.from_dict(config)).train()
    config["algorithm"]["lr"], config["rollout"]["top_p"], config["run"]["steps"] = 0.5, 0.9, 2
    changed = TrainConfig.from_dict(config)
    with pytest.raises(ValueError, match=r"another config \(rollout.top_p: 1.0 -> 0.9\); restore .* --allow-changed"):
        GRPOTrainer(changed, allow_changed=["algorithm.lr"])
    row = GRPOTrainer(changed, allow_changed=["algorithm.lr", "rollout.top_p"]).train()
    assert (row["step"], row["lr"]) == (2, 0.5)
    log = (tmp_path / "run" / "config.changes.jsonl").read_text().splitlines()
    lines = ["rollout.top_p: 1.0 -> 0.9", "algorithm.lr: 0.001 -> 0.5"]
    assert [json.loads(line) for line in log] == [{"steps_before": 1, "changes": lines}]
    # From now on it is the run's own config.
    assert GRPOTrainer(changed).train() == row


@pytest.mark.parametrize(
    ("key", "message"),
    [("model.path", "model.path cannot change within a run"), ("run.sped", "no setting is called 'run.sped'")],
)
def test_changes_that_cannot_be_allowed(tiny_run, tmp_path, key, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run")), allow_changed=[key])


def test_a_checkpoint_names_all_that_the_next_step_depends_on(tiny_run, tmp_path):
    GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1}))).train()
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    state = json.loads((folder / "state.json").read_text())
    assert {"step": 1, "seed": 1, "snapshot_id": None, "processes": 1}.items() <= state.items()
    assert "kl" in state["update"]
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "model",
        "optimizer.pt",
        "random.pt",
        "state.json",
    }
    generators = torch.load(folder / "random.pt", weights_only=True)
    assert len(generators) == 1
    assert generators[0]["cpu"].dtype == torch.uint8


def test_weights_load_in_plain_transformers(tiny_run, tmp_path):
    trainer = GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1})))
    trainer.train()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.save((ids, trainer.model(input_ids=ids).logits), tmp_path / "expected.pt")
    folder = tmp_path / "run" / "checkpoints" / "step_000001" / "model"
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
torch.testing.assert_close(model(input_ids=ids).logits, expected)
assert AutoTokenizer.from_pretrained({str(folder)!r}).encode("sky is blue")
assert not any(name.split(".")[0] == "hiexp" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_directory_that_is_no_run_is_refused(tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no config.resolved.yaml"):
        GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_that_fills_up_during_a_checkpoint(tiny_run, tmp_path, monkeypatch, untouched):
    config = killed_config(tiny_run, tmp_path)
    trainer = GRPOTrainer(TrainConfig.from_dict(config))
    save = trainer.tokenizer.save_pretrained

    def full(folder, *args, **kwargs):
        if "step_000004" in str(folder):
            raise OSError(28, "No space left on device")
        return save(folder, *args, **kwargs)

    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"step_000004.*No space left.*step 2 is whole"):
        trainer.train()
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    with warnings.catch_warnings(action="error"):
        assert checkpoints.latest()[0] == 2
    GRPOTrainer(TrainConfig.from_dict(config)).train()
    assert contents(tmp_path / "run") == untouched
