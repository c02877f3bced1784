"""Two processes on gloo train what one trains: samples, loss, gradients, metrics, weights; all stop if one fails."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hiexp.agent.record import Rollout
from hiexp.io import read_jsonl
from hiexp.rl.distributed import Ranks, balance
from hiexp.rl.metrics import read_metrics

WORKER = str(Path(__file__).with_name("rank_worker.py"))
# Settings under which every part of the update takes part: reference, old log-probs, several updates, several batches.
FULL = {"kl_coef": 0.1, "epochs": 2, "minibatches": 2, "tokens_per_microbatch": 120}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config, size, folder, **names):
    """Exit codes of ``size`` ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiexp.rl.trainer", "hiexp.agent.bm25"])
    port, processes = free_port(), []
    for rank in range(size):
        values = {"CONFIG": config, "RANK": rank, "SIZE": size, "PORT": port, "FOLDER": str(folder), **names}
        processes.append(context.Process(target=runpy.run_path, args=(WORKER, values)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hangs")
    return [process.exitcode for process in processes]


def training(tiny_run, folder, **stages):
    run = {"steps": 2, **stages.pop("run", {})}
    return tiny_run.config(folder / "run", run=run, **{"algorithm": FULL, **stages})


@pytest.fixture(scope="module")
def one(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert launch(training(tiny_run, folder), 1, folder) == [0]
    return folder


@pytest.fixture(scope="module")
def two(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert launch(training(tiny_run, folder), 2, folder) == [0, 0]
    return folder


def rollouts(folder, step):
    path = folder / "run" / "rollouts" / f"step_{step:06d}.jsonl.gz"
    return [Rollout.from_json(row) for _, row in read_jsonl(path)]


def metrics(folder):
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "seconds" not in k and not k.startswith("peak_")} for row in rows]


def weights(folder, step=2):
    return load_file(folder / "run" / "checkpoints" / f"step_{step:06d}" / "model" / "model.safetensors")


def assert_same_training(folder, expected):
    for step in (1, 2):
        pairs = list(zip(rollouts(folder, step), rollouts(expected, step), strict=True))
        assert [a.token_ids for a, _ in pairs] == [b.token_ids for _, b in pairs]
        assert [a.reward for a, _ in pairs] == [b.reward for _, b in pairs]
    for row, other in zip(metrics(folder), metrics(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    for number in range(1, 9):
        gradient = torch.load(expected / f"gradient_{number}_rank0.pt")
        for rank in (0, 1):
            own = torch.load(folder / f"gradient_{number}_rank{rank}.pt")
            torch.testing.assert_close(own, gradient, atol=1e-6, rtol=0)
    assert gradient.abs().max() > 1e-3
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(folder)[name], tensor, atol=1e-5, rtol=0)


def test_two_processes_train_what_one_trains(one, two):
    assert len(metrics(one)) == 2
    assert_same_training(two, one)
    assert torch.load(two / "row_rank0.pt") == torch.load(two / "row_rank1.pt")


def test_two_machines_on_loopback_train_what_one_process_trains(tiny_run, tmp_path, one):
    """The command of docs/distributed.md, once as each machine."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(training(tiny_run, tmp_path)))
    settings = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp_2cpu.yaml"
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), "--num_machines", "2",
             "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
             "--main_process_port", str(port), "-m", "hiexp.cli", "train", str(config)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for port in [free_port()] for rank in (0, 1)
    ]  # fmt: skip
    said = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    for row, other in zip(metrics(tmp_path), metrics(one), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_rank_that_raises_stops_all_with_its_reason(tiny_run, tmp_path, two):
    config = training(tiny_run, tmp_path, run={"checkpoint_every": 1})
    assert launch(config, 2, tmp_path, RAISE=(1, 2)) == [3, 3]
    assert (
        "rank 1 of 2 failed, so all stop: RuntimeError: the corpus caught fire"
        in (tmp_path / "error_rank0.txt").read_text()
    )
    assert (tmp_path / "error_rank1.txt").read_text() == "RuntimeError: the corpus caught fire"
    assert launch(config, 2, tmp_path) == [0, 0]
    assert metrics(tmp_path) == metrics(two)


def test_a_rank_that_is_killed_stops_all_and_the_run_resumes(tiny_run, tmp_path, two):
    config = training(tiny_run, tmp_path, run={"checkpoint_every": 1})
    assert launch(config, 2, tmp_path, KILL=(1, 2)) == [3, -9]
    assert "another process of this run ended" in (tmp_path / "error_rank0.txt").read_text()
    assert launch(config, 2, tmp_path) == [0, 0]
    assert metrics(tmp_path) == metrics(two)
    for name, tensor in weights(two).items():
        assert torch.equal(weights(tmp_path)[name], tensor)


def test_a_run_goes_on_with_another_number_of_processes(tiny_run, tmp_path, one):
    config = training(tiny_run, tmp_path, run={"steps": 1})
    assert launch(config, 2, tmp_path) == [0, 0]
    config["run"]["steps"] = 2
    assert launch(config, 1, tmp_path) == [0]
    for row, other in zip(metrics(tmp_path), metrics(one), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def assert_same_halves(folder, expected):
    """Two launches of one step each, in ``folder``/1 and /2, against one of two steps."""
    for row, other in zip(metrics(folder), metrics(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    for number in range(1, 9):
        # Every run counts its own updates, four a step.
        step, place = divmod(number - 1, 4)
        for rank in (0, 1):
            own = torch.load(folder / str(step + 1) / f"gradient_{place + 1}_rank{rank}.pt")
            torch.testing.assert_close(own, torch.load(expected / f"gradient_{number}_rank0.pt"), atol=1e-6, rtol=0)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(folder)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", [{"FSDP": True}, {"ZERO": 1}, {"ZERO": 2}, {"ZERO": 3}], ids=str)
def test_sharded_ranks_train_save_and_resume_what_one_process_does(tiny_run, tmp_path, one, engine):
    if "ZERO" in engine:
        pytest.importorskip("deepspeed")
    for steps in (1, 2):
        config = training(tiny_run, tmp_path, run={"steps": steps})
        assert launch(config, 2, tmp_path / str(steps), **engine) == [0, 0]
    assert_same_halves(tmp_path, one)
    # One process goes on where two sharded ones stopped.
    config["run"]["steps"] = 3
    assert launch(config, 1, tmp_path) == [0]


@pytest.mark.parametrize("stage", [2, 3], ids=lambda stage: f"ZERO {stage}")
def test_zero_in_bfloat16_keeps_float32_weights_and_resumes_exactly(tiny_run, tmp_path, stage):
    pytest.importorskip("deepspeed")
    for place, steps in (("halves", 1), ("halves", 2), ("whole", 2)):
        folder = tmp_path / place
        config = training(tiny_run, folder, run={"steps": steps})
        assert launch(config, 2, folder / f"to_{steps}", ZERO=stage, BF16=True) == [0, 0]
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    halves, whole = weights(tmp_path / "halves"), weights(tmp_path / "whole")
    for name, tensor in whole.items():
        assert torch.equal(halves[name], tensor)
    matrix = whole["model.embed_tokens.weight"]
    assert matrix.dtype == torch.float32
    assert not torch.equal(matrix, matrix.bfloat16().float())


@pytest.mark.parametrize("engine", [{}, {"ZERO": 2}, {"ZERO": 3}], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_weights_of_all_ranks(tiny_run, tmp_path, engine):
    if "ZERO" in engine:
        pytest.importorskip("deepspeed")
    assert launch(training(tiny_run, tmp_path), 2, tmp_path, SPOIL=True, **engine) == [3, 3]
    before = load_file(tiny_run.model / "model.safetensors")
    for rank in (0, 1):
        message = (tmp_path / f"error_rank{rank}.txt").read_text()
        assert message.startswith("NonFiniteError: step 1: the gradient is not finite")
        left = torch.load(tmp_path / f"left_{rank}.pt")
        for name, tensor in before.items():
            assert torch.equal(left[name], tensor)


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 5))
def test_balance_gives_every_unit_once_and_no_rank_too_many(costs, size):
    shares = balance(costs, size)
    assert sorted(unit for share in shares for unit in share) == list(range(len(costs)))
    assert max(map(len, shares)) <= -(-len(costs) // size)


def test_balance_evens_out_loads():
    assert balance([8, 1, 7, 2], 2) == [[0, 1], [2, 3]]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_are_whole_groups_in_order(sizes, n_ranks):
    keys = [group for group, size in enumerate(sizes) for _ in range(size)]
    parts = [keys[Ranks(rank, n_ranks).share(keys)] for rank in range(n_ranks)]
    assert [key for part in parts for key in part] == keys
    groups = [set(part) for part in parts]
    assert sum(map(len, groups)) == len(sizes)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
