"""The snippets of docs/single_ops.md run, and give what the packages' own code gives."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hiexp

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "single_ops.md"


def snippet(name):
    """The code block that starts with the comment ``# name``."""
    blocks = re.findall(r"```python\n# (.+?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (code,) = [code for title, code in blocks if title == name]
    return compile(code, f"{PAGE.name}: {name}", "exec")


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).double()


def make_batch():
    input_ids = torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(1))
    response_mask = torch.zeros(4, 9, dtype=torch.long)
    for row, (begin, end) in enumerate([(3, 9), (4, 6), (8, 9), (2, 7)]):
        response_mask[row, begin:end] = 1
    return input_ids, torch.ones_like(input_ids), response_mask


def plain_logprobs(model, input_ids):
    logits = model(input_ids=input_ids).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(2, input_ids[:, 1:, None]).squeeze(2)


def test_plain_torch(model):
    input_ids, attention_mask, response_mask = make_batch()
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.5, 0.5]).double(), torch.tensor([3, 3, -8, -8])
    names = {"old_logprobs": None, "model": model, "input_ids": input_ids, "attention_mask": attention_mask}
    names |= {"response_mask": response_mask, "rewards": rewards, "group_ids": group_ids}
    model.zero_grad()
    exec(snippet("plain torch"), names)
    gradient = model.lm_head.weight.grad.clone()
    # By hand: the first group has advantages +-1/sqrt(2), the second is left out; at ratio 1 the gradient of the token
    # mean is -A times that of the log-probs.
    model.zero_grad()
    keep = response_mask[:2, 1:].bool()
    advantage = (torch.tensor([[1.0], [-1.0]]).double() * 0.5 / (0.5**0.5 + 1e-6)).expand_as(keep)[keep]
    (-(advantage * plain_logprobs(model, input_ids)[:2][keep]).sum() / keep.sum()).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-8, atol=1e-12)
    assert names["result"].metrics["tokens"] == int(keep.sum())


def test_shared_prefix(model):
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight)
    prompt, responses = torch.randint(0, 97, (5,)), [torch.randint(0, 97, (n,)) for n in (4, 1, 6)]
    advantages = torch.tensor([1.0, -0.5, 0.25]).double()
    names = {"model": model, "reference_model": other, "prompt_ids": prompt, "responses": responses}
    model.zero_grad()
    exec(snippet("shared prefix"), names | {"advantages": advantages})
    gradient = model.lm_head.weight.grad.clone()
    # At ratio 1 the gradient of the token mean is -A times that of the log-probs.
    model.zero_grad()
    total = 0.0
    for ids, advantage in zip(responses, advantages, strict=True):
        whole = torch.cat([prompt, ids])[None]
        ours, theirs = (torch.log_softmax(m(whole).logits[0, 4:-1], -1) for m in (model, other))
        total = total - advantage * ours.gather(1, ids[:, None]).sum()
        total = total + 0.01 * (ours.exp() * (ours - theirs.detach())).sum()
    (total / 11).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-8, atol=1e-12)


def test_trl_logprobs_equal_its_own(model):
    trainer_class = pytest.importorskip("trl").GRPOTrainer
    names = {}
    exec(snippet("trl"), names)
    input_ids, attention_mask, _ = make_batch()
    results = []
    for kind in (trainer_class, names["HiexpGRPOTrainer"]):
        trainer = object.__new__(kind)
        trainer.temperature = 0.7
        trainer.args = SimpleNamespace(report_to=[])
        trainer.accelerator = SimpleNamespace(
            unwrap_model=lambda wrapped: wrapped, autocast=torch.no_grad, is_main_process=False
        )
        own = patched(model, trainer.temperature) if kind is trainer_class else model
        results.append(
            trainer._get_per_token_logps_and_entropies(own, input_ids, attention_mask, 4, compute_entropy=True)
        )
    for expected, actual in zip(results[0][:2], results[1][:2], strict=True):
        assert actual.shape == (4, 4)
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


def patched(model, temperature):
    """A copy as GRPOTrainer prepares it."""
    from trl.trainer import grpo_trainer

    own = copy.deepcopy(model)
    grpo_trainer.add_fused_lm_head(own, temperature=temperature, outputs=("log_probs", "entropy"))
    return own


def test_trl_advantages_of_one_process(monkeypatch):
    trainer_class = pytest.importorskip("trl").GRPOTrainer
    names = {}
    exec(snippet("trl"), names)
    values = torch.tensor([[1.0], [0.0], [torch.nan], [2.0], [0.0], [4.0]])  # two processes, three rows each
    monkeypatch.setattr(trainer_class, "_calculate_rewards", lambda self, inputs: values)

    def original(self, inputs):
        self._calculate_rewards(inputs)
        return {"advantages": None}

    monkeypatch.setattr(trainer_class, "_generate_and_score_completions", original)
    trainer = object.__new__(names["HiexpGRPOTrainer"])
    trainer.reward_weights, trainer.num_generations = torch.tensor([2.0]), 3
    trainer.accelerator = SimpleNamespace(process_index=1)
    actual = trainer._generate_and_score_completions([None] * 3)["advantages"]
    torch.testing.assert_close(actual, torch.tensor([0.0, -4.0, 4.0]) / (4.0 + 1e-4))


def test_verl(monkeypatch):
    spec = importlib.util.spec_from_file_location("verl_functions", ROOT / "benchmarks" / "verl_functions.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    verl = loader.load() or pytest.skip("verl is not installed")
    monkeypatch.setitem(sys.modules, loader.MODULE, verl)
    for parent in ("verl", "verl.trainer", "verl.trainer.ppo"):
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
    for registry in ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"):
        monkeypatch.setattr(verl, registry, dict(getattr(verl, registry)))
    exec(snippet("verl"), {})

    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.5, 0.0], [3.0, 0.0]])
    mask, uids = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]), np.array(["b", "b", "b", "a"], dtype=object)
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": uids}
    advantages, _ = verl.get_adv_estimator_fn("hiexp")(**arguments)
    torch.testing.assert_close(advantages, verl.get_adv_estimator_fn("grpo")(**arguments)[0], rtol=1e-5, atol=1e-5)

    config = SimpleNamespace(
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        clip_ratio_c=2.0,
        global_batch_info={"batch_num_tokens": 14, "dp_size": 2},
    )
    log_prob = torch.tensor([[-1.0, -0.5], [-2.0, 0.0], [-0.1, -0.9], [-1.0, -1.0]], requires_grad=True)
    old = torch.full((4, 2), -0.8)
    loss, metrics = verl.get_policy_loss_fn("hiexp")(old, log_prob, advantages, mask, config=config)
    ratio = (log_prob - old).exp()
    terms = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    terms = torch.where(advantages < 0, torch.maximum(terms, 2.0 * advantages), terms)
    torch.testing.assert_close(loss, -(terms * mask).sum() / 14 * 2)
    assert metrics["actor/tokens"] == 7


def test_the_table_names_public_functions():
    named = set(re.findall(r"^\| `(\w+)\(", PAGE.read_text(encoding="utf-8"), re.M))
    assert len(named) == 6
    assert named <= set(hiexp.__all__)
