"""LoRA: only the adapter learns, with the gradients of plain autograd; the reference is the model without it."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hiexp.agent.engine_transformers import TransformersEngine
from hiexp.rl.batch import microbatches
from hiexp.rl.config import ModelConfig, TrainConfig
from hiexp.rl.lora import PlainWeights
from hiexp.rl.metrics import read_metrics
from hiexp.rl.model import load_policy
from hiexp.rl.policy import Policy
from hiexp.rl.scorer import PolicyScorer
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.update import PolicyUpdate
from hiexp.rl.weight_sync import LocalReplica

pytest.importorskip("peft")
LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def make_policy(tiny_run, **stages):
    config = TrainConfig.from_dict(tiny_run.config("unused", model={**LORA, **stages.pop("model", {})}, **stages))
    model, _ = load_policy(config.model)
    return Policy(model, config, Accelerator(cpu=True)), config


def stir(policy):
    """Second matrices of an adapter begin at 0; here they get some values."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(policy.model.named_parameters()):
            if "lora_B" in name:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))


def rollouts(n=6):
    from hiexp.agent.record import Rollout

    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        tokens = [5, 6, 7, 8, *rng.integers(4, 30, int(rng.integers(4, 14))).tolist()]
        mask = [0, 0, 0, 0, *[1] * (len(tokens) - 4)]
        logprobs = [-3.0 * m for m in mask]
        made.append(
            Rollout(f"q/{i}/0", "q", "?", tokens, mask, logprobs, [], [], [], None, i, 0, "hiexp", "answer", "x")
        )
    return made


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_adapter_equal_plain_autograd(tiny_run, packed, checkpointing):
    policy, config = make_policy(tiny_run, model={"gradient_checkpointing": checkpointing}, algorithm={"kl_coef": 0.0})
    stir(policy)
    made, advantages = rollouts(), np.array([1.0, -1.0, 0.5, 2.0, -0.7, 0.3])
    update = PolicyUpdate(
        policy.scorer, None, policy.optimizer, Accelerator(cpu=True), config.algorithm,
        pad_id=0, constant_length=20, seed=0, packed=packed,
    )  # fmt: skip
    seen = {}
    policy.optimizer.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    )
    policy.model.train(checkpointing)
    norm = update.run(made, advantages, range(6), step=1)["grad_norm"]

    plain, _ = make_policy(tiny_run)
    stir(plain)
    loss = 0.0
    for rollout, advantage in zip(made, advantages, strict=True):
        ids = torch.tensor([rollout.token_ids])
        logits = plain.model(input_ids=ids).logits[0, 3:-1] / config.rollout.temperature
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 4:, None])[:, 0]
        # With one update the ratio is 1, and its gradient that of the log-prob.
        loss = loss - advantage * logprobs.mean() / len(made)
    loss.backward()
    expected = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    assert set(seen) == set(expected)
    assert all("lora_" in name for name in seen)
    total = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    assert norm == pytest.approx(total, rel=1e-4)
    scale = min(1.0, config.algorithm.max_grad_norm / total)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient * scale, atol=1e-6, rtol=1e-3)


def test_the_reference_is_the_model_without_the_adapter(tiny_run):
    policy, config = make_policy(tiny_run, algorithm={"kl_coef": 0.1})
    stir(policy)
    base = PolicyScorer(load_policy(config.model)[0], config.rollout.temperature)
    batch = microbatches(rollouts(), range(6), 1000, 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(policy.reference(batch).logprobs, base(batch).logprobs)
        assert (policy.scorer(batch).logprobs - base(batch).logprobs).abs().max() > 1e-2
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "adapter_model.safetensors")


def test_a_run_trains_saves_and_resumes_the_adapter_alone(tiny_run, tmp_path):
    settings = {**LORA, "lora_merged": True, "lora_dropout": 0.1}
    options = {"model": settings, "algorithm": {"kl_coef": 0.05, "minibatches": 2}}
    whole = tiny_run.config(tmp_path / "whole", run={"steps": 3, "checkpoint_every": 3}, **options)
    last = GRPOTrainer(TrainConfig.from_dict(whole)).train()
    for steps in (2, 3):
        torch.randn(steps)
        pieces = tiny_run.config(tmp_path / "pieces", run={"steps": steps}, **options)
        trainer = GRPOTrainer(TrainConfig.from_dict(pieces))
        row = trainer.train()
    assert {k: v for k, v in row.items() if "seconds" not in k and "peak" not in k} == {
        k: v for k, v in last.items() if "seconds" not in k and "peak" not in k
    }
    final = tmp_path / "pieces" / "checkpoints" / "step_000003"
    expected = weights(tmp_path / "whole" / "checkpoints" / "step_000003")
    got = weights(final)
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert any(tensor.abs().max() > 0 for name, tensor in got.items() if "lora_B" in name)
    assert not list((final / "model").glob("model*.safetensors"))
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected_logits = trainer.model(input_ids=ids).logits
    torch.save((ids, expected_logits), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
for folder in ("merged", "model"):
    model = AutoModelForCausalLM.from_pretrained({str(final)!r} + "/" + folder).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
assert "hiexp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_that_get_no_adapter(tiny_run):
    with pytest.raises(ValueError, match=r"model.lora_targets: .*nowhere"):
        make_policy(tiny_run, model={"lora_targets": ["nowhere"]})
    with pytest.raises(ValueError, match=r"model.lora_targets: expected no LM head"):
        make_policy(tiny_run, model={"lora_targets": ["q_proj", "lm_head"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [["all-linear"], ["v_proj", "down_proj"]])
def test_plain_weights_are_those_of_a_merged_model(tiny_run, dtype, targets):
    policy, config = make_policy(tiny_run, model={"dtype": dtype, "lora_targets": targets, "lora_dropout": 0.5})
    stir(policy)
    policy.model.train()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    plain = PlainWeights(policy.model)
    base = load_policy(config.model)[0].state_dict()
    assert list(plain) == list(base)
    merged = copy.deepcopy(policy._adapted).merge_and_unload().state_dict()
    for name, tensor in plain.items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, merged[name])
    changed = {name for name in base if not torch.equal(plain[name], base[name])}
    assert {name.split(".")[-2] for name in changed} >= set(targets) - {"all-linear"}
    assert len(changed) == sum("lora_B" in name for name in before)
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_of_a_model_without_adapters_are_its_own(tiny_run):
    model, _ = load_policy(ModelConfig(path=str(tiny_run.model), device="cpu"))
    plain, own = PlainWeights(model), model.state_dict()
    assert list(plain) == list(own)
    assert all(plain[name].data_ptr() == own[name].data_ptr() for name in own)


def test_a_server_gets_one_file_of_a_plain_model(tiny_run, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from hiexp.agent.openai_server import OpenAIServer
    from hiexp.rl import weight_sync

    policy, _ = make_policy(tiny_run)
    stir(policy)
    monkeypatch.setattr(weight_sync, "post_json", lambda *args, **kwargs: {"success": True})
    server = OpenAIServer("tiny", "http://127.0.0.1:9/v1")
    weight_sync.ServerReplica(server, tmp_path / "pushed", policy.model.config).load_weights(PlainWeights(policy.model))
    merged = policy._adapted.merge_and_unload().state_dict()
    written = load_file(tmp_path / "pushed" / "model.safetensors")
    assert set(written) == set(merged)
    assert all(torch.equal(written[name], merged[name]) for name in merged)


class PlainEngine(TransformersEngine):
    """Stands in for vLLM: a plain model of the config in a folder, which takes exactly the weights it knows."""

    def __init__(self, folder, tokenizer, *, random_weights, context_length, **_):
        from transformers import AutoConfig, AutoModelForCausalLM

        assert random_weights
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        super().__init__(model, tokenizer, context_length=context_length)
        replica = LocalReplica(model)
        self.load_weights, self.prompt_logprobs = replica.load_weights, replica.prompt_logprobs


@pytest.mark.parametrize("lag", [0, 1])
def test_an_engine_with_weights_of_its_own_samples_the_adapted_policy(tiny_run, tmp_path, monkeypatch, lag):
    from hiexp.agent import engine_vllm

    installed = ModuleType("vllm")
    installed.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", installed)
    monkeypatch.setattr(engine_vllm, "VllmEngine", PlainEngine)
    rows = {}
    for engine in ("vllm", "transformers"):
        settings = tiny_run.config(
            tmp_path / engine, model=LORA, algorithm={"lr": 1e-2},
            rollout={"engine": engine, "staleness": lag, "sync_tolerance": 1e-4},
        )  # fmt: skip
        GRPOTrainer(TrainConfig.from_dict(settings)).train()
        rows[engine] = read_metrics(tmp_path / engine / "metrics.jsonl")
    assert all(row["sync_gap_max"] < 1e-4 for row in rows["vllm"])
    if lag == 0:
        assert all(row["engine_mismatch_max"] < 1e-4 for row in rows["vllm"])
        assert rows["vllm"][0]["grad_norm"] == pytest.approx(rows["transformers"][0]["grad_norm"], rel=1e-3)
    else:
        # A copy of the model has the adapter's own layers, so nothing is rounded.
        assert all(row["sync_gap_max"] == 0.0 for row in rows["transformers"])
    assert all(row["grad_norm"] > 0 for row in rows["vllm"])


def test_the_adapter_of_a_run_is_that_of_its_seed(tiny_run):
    first, _ = make_policy(tiny_run)
    torch.randn(7)
    again, _ = make_policy(tiny_run)
    other, _ = make_policy(tiny_run, run={"seed": 2})
    names = [name for name, _ in first.model.named_parameters() if "lora_A" in name]
    get = [dict(policy.model.named_parameters()) for policy in (first, again, other)]
    assert all(torch.equal(get[0][name], get[1][name]) for name in names)
    assert not any(torch.equal(get[0][name], get[2][name]) for name in names)
    assert ModelConfig().lora_rank == 0
