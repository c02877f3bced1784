"""Which engine a config asks for, and the settings that contradict each other."""

from __future__ import annotations

import sys

import pytest

from hiexp.agent.engine_openai import OpenAIEngine
from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.rl.config import TrainConfig
from hiexp.rl.make_engine import make_engine, training_engine
from hiexp.rl.model import load_policy
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.weight_sync import LocalReplica, ServerReplica

URL = "http://127.0.0.1:9/v1"


def config(tiny_run, tmp_path, context=64, **rollout):
    model = {"path": str(tiny_run.model), "context_length": context}
    return TrainConfig.from_dict(tiny_run.config(tmp_path / "run", rollout=rollout, model=model))


def test_the_default_samples_from_the_trained_model(tiny_run, tmp_path):
    settings = config(tiny_run, tmp_path)
    assert isinstance(make_engine(settings), TransformersEngine)
    model, tokenizer = load_policy(settings.model)
    engine, replica = training_engine(settings, model, tokenizer)
    assert engine.model is model
    assert replica is None


def test_rollouts_ahead_sample_from_a_copy(tiny_run, tmp_path):
    settings = config(tiny_run, tmp_path, staleness=1)
    model, tokenizer = load_policy(settings.model)
    engine, replica = training_engine(settings, model, tokenizer)
    assert isinstance(replica, LocalReplica)
    assert engine.model is replica.model is not model
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in engine.model.parameters()}


def test_a_server(tiny_run, tmp_path):
    settings = config(tiny_run, tmp_path, server=URL, weights_dir=str(tmp_path / "weights"))
    assert isinstance(make_engine(settings), OpenAIEngine)
    model, tokenizer = load_policy(settings.model)
    engine, replica = training_engine(settings, model, tokenizer)
    assert isinstance(engine, OpenAIEngine)
    assert isinstance(replica, ServerReplica)
    assert replica.root == "http://127.0.0.1:9"


def test_settings_that_contradict_each_other_are_refused(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.engine: expected transformers"):
        config(tiny_run, tmp_path, server=URL, engine="vllm")
    with pytest.raises(ValueError, match=r"rollout\.weights_dir: expected a folder in training"):
        GRPOTrainer(config(tiny_run, tmp_path, server=URL))
    with pytest.raises(ValueError, match=r"rollout\.server_api: expected completions for training: .* no log-probs"):
        GRPOTrainer(config(tiny_run, tmp_path, server=URL, server_api="chat", weights_dir="w"))
    with pytest.raises(ValueError, match=r"rollout\.server: expected the base URL"):
        config(tiny_run, tmp_path, server_api="chat")
    with pytest.raises(ValueError, match=r"model\.context_length"):
        make_engine(config(tiny_run, tmp_path, context=None, server=URL))


def test_without_vllm_the_error_says_what_to_install(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'hiexp\[vllm\]'"):
        make_engine(config(tiny_run, tmp_path, engine="vllm"))
