"""On identical rollouts the loss of a whole model and its gradients equal TRL's, for each way of batching.

TRL's loss runs on a stub of its trainer, on left-padded prompts and right-padded responses and the model's logits;
ours on packed groups behind their prompt, or on padded rollouts, and on hidden states.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hiexp.agent.record import Rollout
from hiexp.rl.batch import microbatches
from hiexp.rl.scorer import PolicyScorer

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 11]]
RESPONSES = [[[3, 4, 12], [13, 14, 15, 16]], [[9, 8], [10, 11, 12, 13, 14]]]
LONGEST = 7


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def make_rollouts():
    rollouts = []
    for group, (prompt, responses) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for i, response in enumerate(responses):
            tokens, mask = prompt + response, [0] * len(prompt) + [1] * len(response)
            name, logprobs = f"q{group}/0/{i}", [-1.0 * m for m in mask]
            rollouts.append(
                Rollout(name, f"q{group}", "?", tokens, mask, logprobs, [], [], [], None, 0, 0, "hiexp", "answer", None)
            )
    return rollouts


def pad(rows, *, left=False):
    width = max(map(len, rows))
    zeros = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([[*zero, *row] if left else [*row, *zero] for row, zero in zip(rows, zeros, strict=True)])


def trl_loss(model, loss_type, beta, old, reference, advantages):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl")
    from trl.trainer.utils import selective_log_softmax

    prompts = pad([prompt for prompt, group in zip(PROMPTS, RESPONSES, strict=True) for _ in group], left=True)
    prompt_mask = (prompts != 0).long()  # no token of the batch is 0
    flat = [response for group in RESPONSES for response in group]
    completions, mask = pad(flat), pad([[1] * len(row) for row in flat])
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, mask], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    logprobs = selective_log_softmax(logits[:, prompts.shape[1] - 1 : -1], completions)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        importance_sampling_level="token", beta=beta, loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.2,
        use_vllm=False, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": pad_values(old, mask),
        "ref_per_token_logps": pad_values(reference, mask), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trainer.GRPOTrainer._compute_loss(stub, None, inputs)


def pad_values(rows, mask):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def our_loss(model, kind, beta, old, reference, advantages, packed):
    rollouts = make_rollouts()
    (batch,) = microbatches(rollouts, range(len(rollouts)), 10_000, 0, packed=packed)
    n_tokens = len(batch.targets)
    return PolicyScorer(model, 1.0)(
        batch,
        loss={
            "old_logprobs": torch.cat([old[i] for i in batch.indices]),
            "ref_logprobs": torch.cat([reference[i] for i in batch.indices]),
            "advantages": advantages[batch.indices],
            "denominator": float(n_tokens if kind == "dapo" else len(rollouts)),
            "constant_length": LONGEST if kind == "dr_grpo" else None,
            "kind": kind, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": beta,
        },
    ).loss  # fmt: skip


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients(model, kind, beta, packed):
    generator = torch.Generator().manual_seed(1)
    flat = [response for group in RESPONSES for response in group]
    # Far from the model's own log-probs in both directions, so that some ratios are clipped.
    with torch.no_grad():
        base = [_own_logprobs(model, i) for i in range(len(flat))]
    noise = [0.4 * torch.randn(len(row), generator=generator, dtype=torch.float64) for row in flat]
    old = [one + shift for one, shift in zip(base, noise, strict=True)]
    reference = [one + shift.flip(0) for one, shift in zip(base, noise, strict=True)]
    advantages = torch.tensor([1.0, -1.0, 0.7, -0.7], dtype=torch.float64)
    mine = our_loss(model, kind, beta, old, reference, advantages, packed)
    theirs = trl_loss(model, kind, beta, old, reference, advantages)
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    difference = gradients(model, mine) - gradients(model, theirs)
    # The model's norms compute in float32, and the two batches give them other shapes; entries are of the order of 1.
    assert float(difference.abs().max()) < 1e-6


def _own_logprobs(model, i):
    rollout = make_rollouts()[i]
    ids, n = torch.tensor([rollout.token_ids]), sum(rollout.loss_mask)
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[-n:]
