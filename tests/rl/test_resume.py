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
from collections import Counter
from pathlib import Path

import pytest
import torch

from hiexp.io import DataError, read_jsonl
from hiexp.rl.checkpoint import Checkpoints
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import TIME_KEYS, read_metrics
from hiexp.rl.preemption import Preempted, watched
from hiexp.rl.trainer import GRPOTrainer

WORKER = str(Path(__file__).with_name("resume_worker.py"))
KILLED = -9


def start(config, kill_at_flush=None, events=None):
    # A fork server has torch loaded, so a run starts in a tenth of a second instead of several.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiexp.rl.trainer", "hiexp.agent.bm25"])
    names = {"CONFIG": config, "KILL_AT_FLUSH": kill_at_flush, "EVENTS": events}
    process = context.Process(target=runpy.run_path, args=(WORKER, names))
    process.start()
    return process


def finish(config, kill_at_flush=None, events=None):
    process = start(config, kill_at_flush, events)
    process.join(120)
    return process.exitcode


def timeless(value):
    """``value`` of parsed JSON without what the clock decides and the hashes of files that hold such things."""
    if isinstance(value, list):
        return [timeless(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: timeless(one)
        for key, one in value.items()
        if key not in TIME_KEYS and key != "seconds" and not key.startswith("ahead/")
    }


def contents(run_dir):
    """Everything of a run that config and seed decide."""
    run_dir = Path(run_dir)
    rows = timeless(read_metrics(run_dir / "metrics.jsonl"))
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for pattern in ("checkpoints/*/model/*", "checkpoints/*/*.pt", "eval/*", "tokenizer/*")
        for path in sorted(run_dir.glob(pattern))
    }
    files |= {
        str(path.relative_to(run_dir)): timeless(json.loads(path.read_text()))
        for path in run_dir.glob("checkpoints/*/*.json")
    }
    rollouts = {
        str(path.relative_to(run_dir)): [timeless(row) for _, row in read_jsonl(path)]
        for pattern in ("rollouts/*", "checkpoints/*/ahead/*")
        for path in run_dir.glob(pattern)
    }
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


def small_config(tiny_run, run_dir, **stages):
    """Two steps of two questions, with as few events as a run can have."""
    small = {"steps": 2, "checkpoint_every": 1, "questions_per_step": 2}
    return tiny_run.config(
        run_dir, run=small, evaluation={"questions": 0}, rollout={"group_size": 3} | stages.pop("rollout", {}), **stages
    )


@pytest.mark.parametrize(("ahead", "times"), [(False, 30), (True, 20)])
def test_killed_at_fifty_random_places_and_continued(tiny_run, tmp_path, hek_path, ahead, times):
    """While it starts, acts, learns and writes; also with experience in half of each group and rollouts ahead."""
    stages = {}
    if ahead:
        experience = {"hek": str(hek_path), "experience_share": 0.5, "e1_threshold": -1.0}
        stages = {"experience": experience, "rollout": {"staleness": 1, "group_size": 4, "max_total_tokens": 64}}
    notes = tmp_path / "events"
    assert finish(small_config(tiny_run, tmp_path / "untouched", **stages), events=(str(notes), None)) == 0
    expected, (total,) = contents(tmp_path / "untouched"), map(json.loads, notes.read_text().splitlines())
    # "start" counts all events; those before the first rollouts are wanted here.
    total["start"] -= total["train"]
    notes.write_text("")
    draw, kills, runs = random.Random(0), dict.fromkeys(total, 0), 0
    places = itertools.cycle(kills)
    while sum(kills.values()) < times:
        runs += 1
        config = small_config(tiny_run, tmp_path / f"run{runs}", **stages)
        code = KILLED
        while code == KILLED:
            place = next(places)
            code = finish(config, events=(str(notes), (place, draw.randrange(total[place]))))
            kills[place] += code == KILLED
        assert code == 0
        assert contents(tmp_path / f"run{runs}") == expected
        assert not list((tmp_path / f"run{runs}").rglob("*.tmp"))
    assert min(kills.values()) >= 3, kills
    died_in = Counter(line for line in notes.read_text().splitlines() if line[0] != "{")
    assert sum(died_in.values()) == sum(kills.values())
    acting = sum(count for event, count in died_in.items() if event.startswith(("SearchAgent", "Transformers")))
    assert acting >= 3, died_in


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


def test_a_run_whose_checkpoints_are_all_damaged_keeps_what_it_has(tiny_run, tmp_path):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1}))
    GRPOTrainer(config).train()
    (tmp_path / "run" / "checkpoints" / "step_000001" / "optimizer.pt").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"step_000001: damaged checkpoint \(optimizer.pt is missing\).*another run.dir"
    ):
        GRPOTrainer(config).train()
    assert contents(tmp_path / "run") == before
    assert len(before[0]) == len(before[2]) == 1


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2), (signal.SIGTERM, 4)])
def test_a_signal_ends_the_run_behind_a_checkpoint(tiny_run, tmp_path, untouched, number, step):
    config = killed_config(tiny_run, tmp_path)
    trainer = GRPOTrainer(TrainConfig.from_dict(config))

    def listen(kind, row):
        if kind == "step" and row["step"] == step:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"after step {step}, which is checkpointed") as stop:
        trainer.train(listen)
    assert stop.value.step == step
    assert signal.getsignal(number) == before
    run = tmp_path / "run"
    # checkpoint_every is 2: the one of step 1 is there because of the signal.
    assert Checkpoints(run / "checkpoints").steps()[-1] == step
    # No time for the evaluation that is due at 2 and 4: it is made when the run goes on.
    assert not (run / "eval" / f"step_{step:06d}.json").exists()
    assert GRPOTrainer(TrainConfig.from_dict(config)).train()["step"] == 4
    if step == 1:
        assert contents(run)[0] == untouched[0]
    else:
        assert contents(run) == untouched


@pytest.mark.parametrize("during", [False, True])
def test_a_signal_before_the_first_step(tiny_run, tmp_path, monkeypatch, during):
    """Before the first evaluation none is made; one under way is finished, and no step is begun."""
    config = TrainConfig.from_dict(killed_config(tiny_run, tmp_path))
    trainer = GRPOTrainer(config)
    owner, name = (trainer, "evaluate") if during else (trainer, "_resume")
    wrapped = getattr(owner, name)

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return wrapped(*args)

    monkeypatch.setattr(owner, name, asked)
    with pytest.raises(Preempted, match="stopped by a signal before the first step; run the same"):
        trainer.train()
    assert (tmp_path / "run" / "eval" / "step_000000.json").exists() == during
    assert not Checkpoints(tmp_path / "run" / "checkpoints").steps()


def test_the_best_evaluation_has_a_checkpoint(tiny_run, tmp_path, monkeypatch):
    """Also between the steps of checkpoint_every; it stays while later ones come and go."""
    stages = {"run": {"steps": 6, "checkpoint_every": 6, "keep_last": 1}, "evaluation": {"every": 1}}
    trainer = GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run", **stages)))
    scores, written = [0.9, 0.1, 0.5, 0.5, 0.7, 0.6, 0.2], []
    save = trainer.checkpoints.save
    monkeypatch.setattr(
        trainer, "evaluate", lambda step: {"step": step, "without_hek": {"reward": scores[step]}, "with_hek": None}
    )
    monkeypatch.setattr(
        trainer.checkpoints, "save", lambda step, *rest: (written.append((step, rest[1])), save(step, *rest))
    )
    trainer.train()
    # Not at 3, an equal, and 5; step 0 has no checkpoint: that is the starting model.
    assert written == [(1, 0.1), (2, 0.5), (4, 0.7), (6, 0.2)]
    assert trainer.checkpoints.steps() == [4, 6]
    assert trainer.checkpoints.best() == 4


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
