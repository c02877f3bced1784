"""GRPO with rollouts by vLLM: every step's rollouts come from the weights of the update before."""

from __future__ import annotations

import numpy as np
import pytest

from hiexp.agent.engine_vllm import VllmEngine
from hiexp.agent.record import Rollout
from hiexp.io import read_jsonl
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import TIME_KEYS, read_metrics
from hiexp.rl.weight_sync import WeightSyncError, sequence_logprobs


@pytest.fixture(scope="module")
def one_engine():
    """Trainers of this file share one vLLM engine: they train models of one shape."""
    from hiexp.agent import engine_vllm

    made = []

    def make(*args, **kwargs):
        if not made:
            made.append(VllmEngine(*args, **kwargs))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_vllm, "VllmEngine", make)
        yield made


def config(miniature, path, steps=2, model=(), **rollout):
    settings = miniature.config(
        path,
        model=dict(model),
        rollout={"engine": "vllm", "vllm_cache_gib": 0.0625, **rollout},
        algorithm={"lr": 1e-2},
        run={"steps": steps, "checkpoint_every": 1, "keep_last": 9},
    )
    return TrainConfig.from_dict(settings)


def rollouts(path, step):
    return [Rollout.from_json(row) for _, row in read_jsonl(path / "rollouts" / f"step_{step:06d}.jsonl.gz")]


def largest_gap(path, policy, made):
    """Most |engine log-prob - log-prob under the checkpoint of step ``policy``| over the sampled tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path / "checkpoints" / f"step_{policy:06d}" / "model")
    gaps = []
    for one in made:
        gap = np.abs(sequence_logprobs(model, one.token_ids) - one.logprobs[1:])
        gaps += gap[np.asarray(one.loss_mask[1:]) == 1].tolist()
    return max(gaps)


@pytest.fixture(scope="module")
def trained(miniature, tmp_path_factory, one_engine):
    from hiexp.rl.trainer import GRPOTrainer

    path = tmp_path_factory.mktemp("trained") / "run"
    trainer = GRPOTrainer(config(miniature, path, steps=3))
    trainer.train()
    return path, trainer


def test_every_step_acts_with_the_weights_of_the_update_before(trained):
    path, _ = trained
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 0, 0]
    assert all(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        assert row["engine_mismatch"] < 1e-4
        assert row["sync_gap_mean"] <= row["sync_gap_max"] < 1e-3
        assert row["seconds_sync"] > 0
    for step in (2, 3):
        made = rollouts(path, step)
        assert largest_gap(path, step - 1, made) < 1e-3
        if step == 3:
            assert largest_gap(path, step - 2, made) > 1e-3  # the weights before differ, so this could fail


def test_rollouts_equal_those_of_the_transformers_engine(trained, miniature, tmp_path):
    """Same weights and seeds: the first step's rollouts are the same tokens whoever samples them."""
    from hiexp.rl.trainer import GRPOTrainer

    path, _ = trained
    settings = miniature.config(tmp_path / "local", algorithm={"lr": 1e-2}, run={"steps": 1})
    GRPOTrainer(TrainConfig.from_dict(settings)).train()
    assert [one.token_ids for one in rollouts(tmp_path / "local", 1)] == [one.token_ids for one in rollouts(path, 1)]


def test_a_continued_run_equals_an_uninterrupted_one(trained, miniature, tmp_path, one_engine):
    from hiexp.rl.trainer import GRPOTrainer

    path, _ = trained
    GRPOTrainer(config(miniature, tmp_path / "run", steps=2)).train()
    GRPOTrainer(config(miniature, tmp_path / "run", steps=3)).train()
    whole, cut = (read_metrics(folder / "metrics.jsonl") for folder in (path, tmp_path / "run"))
    for a, b in zip(whole, cut, strict=True):
        for key in a.keys() - set(TIME_KEYS):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key


def test_weights_that_do_not_arrive_stop_the_run(miniature, tmp_path, one_engine, monkeypatch):
    from hiexp.rl.trainer import GRPOTrainer

    trainer = GRPOTrainer(config(miniature, tmp_path / "run", steps=4, sync_tolerance=1e-4))
    load, calls = one_engine[0].load_weights, []

    def lossy(weights):
        calls.append(1)
        if len(calls) != 2:  # the second push is lost
            load(weights)

    monkeypatch.setattr(one_engine[0], "load_weights", lossy)
    with pytest.raises(WeightSyncError, match="new weights did not arrive"):
        trainer.train()
    assert len(calls) == 2


def test_rollouts_ahead_by_vllm(miniature, tmp_path, one_engine):
    from hiexp.rl.trainer import GRPOTrainer

    path = tmp_path / "run"
    GRPOTrainer(config(miniature, path, steps=4, staleness=1)).train()
    assert [row["staleness"] for row in read_metrics(path / "metrics.jsonl")] == [0, 1, 1, 1]
    made = rollouts(path, 4)
    assert {one.policy_step for one in made} == {2}
    assert largest_gap(path, 2, made) < 1e-3 < largest_gap(path, 3, made)


def test_an_adapter_reaches_vllm_inside_the_weights(miniature, tmp_path, one_engine):
    """The engine samples the policy of the checkpoint, adapter included, and not the one before it."""
    pytest.importorskip("peft")
    from hiexp.rl.trainer import GRPOTrainer

    path = tmp_path / "run"
    GRPOTrainer(config(miniature, path, steps=3, model={"lora_rank": 4, "lora_alpha": 8.0})).train()
    assert (path / "checkpoints" / "step_000002" / "model" / "adapter_model.safetensors").exists()
    for row in read_metrics(path / "metrics.jsonl"):
        assert row["engine_mismatch"] < 1e-4
        assert row["sync_gap_max"] < 1e-3
    made = rollouts(path, 3)
    assert largest_gap(path, 2, made) < 1e-3 < largest_gap(path, 1, made)


def test_a_checkpoint_loads_in_vllm(trained):
    """``save_pretrained`` output, read from the disk by vLLM itself, is the policy of that step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, _ = trained
    folder = path / "checkpoints" / "step_000003" / "model"
    engine = VllmEngine(str(folder), AutoTokenizer.from_pretrained(folder), cache_gib=0.0625)
    model = AutoModelForCausalLM.from_pretrained(folder)
    probes = [one.token_ids for one in rollouts(path, 3)[:6]]
    for probe, values in zip(probes, engine.prompt_logprobs(probes), strict=True):
        assert values == pytest.approx(sequence_logprobs(model, probe), abs=2e-4)
