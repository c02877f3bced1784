"""Pushing weights: the comparison afterwards, and the config a vLLM without weights starts from."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from hiexp.rl.config import ModelConfig
from hiexp.rl.model import load_policy
from hiexp.rl.weight_sync import LocalReplica, WeightSync, WeightSyncError, sequence_logprobs, write_model_config

PROBES = [[4, 5, 6, 7, 8], [9, 10], [11]]


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_policy(ModelConfig(path=str(tiny_run.model), device="cpu"))[0]


@pytest.fixture
def changed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return other


def test_logprobs_are_those_of_the_model(model):
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    logits = model(input_ids=ids).logits[0].double()
    expected = [logits[t].log_softmax(-1)[ids[0, t + 1]].item() for t in range(4)]
    assert sequence_logprobs(model, ids[0].tolist()) == pytest.approx(expected, abs=1e-5)


def test_a_push_brings_the_weights_and_the_check_sees_them_missing(model, changed):
    replica = LocalReplica(copy.deepcopy(model))
    sync = WeightSync(replica, PROBES, tolerance=1e-3)
    assert [len(probe) for probe in sync.probes] == [5, 2]  # one token predicts nothing
    assert sync.check(sync.expected(model)) == {"sync_gap_mean": 0.0, "sync_gap_max": 0.0}
    with pytest.raises(WeightSyncError, match="5 probe tokens"):
        sync.check(sync.expected(changed))
    assert sync.push(changed.state_dict()) >= 0
    assert sync.check(sync.expected(changed))["sync_gap_max"] == 0.0
    with pytest.raises(WeightSyncError):
        sync.check(sync.expected(model))


def test_one_tensor_that_does_not_arrive_is_noticed(model, changed):
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        replica = LocalReplica(copy.deepcopy(model))
        sync = WeightSync(replica, PROBES, tolerance=1e-3)
        kept = model.state_dict()
        sync.push({key: kept[key] if key == name else value for key, value in changed.state_dict().items()})
        with pytest.raises(WeightSyncError):
            sync.check(sync.expected(changed))


def test_values_that_are_not_finite_are_refused(model):
    class Broken(LocalReplica):
        def prompt_logprobs(self, sequences):
            return [[float("nan")] * (len(sequence) - 1) for sequence in sequences]

    sync = WeightSync(Broken(model), PROBES, tolerance=1e9)
    with pytest.raises(WeightSyncError, match="nan"):
        sync.check(sync.expected(model))


def test_probes_that_compare_nothing_are_refused(model):
    with pytest.raises(ValueError, match="two or more tokens"):
        WeightSync(LocalReplica(model), [[3], []], tolerance=0.1)


def test_long_probes_are_cut(model):
    assert len(WeightSync(LocalReplica(model), [list(range(1000))], 0.1).probes[0]) == 256


def test_the_config_says_which_model_it_is(model, tmp_path):
    from transformers import AutoConfig

    write_model_config(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == model.config.hidden_size
    assert np.array_equal(sorted(path.name for path in tmp_path.glob("*.safetensors")), [])
