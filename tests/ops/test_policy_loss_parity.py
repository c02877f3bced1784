"""policy_loss equals TRL's and verl's own code, values and gradients, where those packages can be imported.

TRL's loss is a method of its trainer: it is called on a stub that hands it the log-probs. verl's losses are functions.
Both work on padded (B, T) batches. The last tests pin down where we differ on purpose; the header of policy_loss.py
lists these.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from hiexp.ops.policy_loss import policy_loss

# Real spread: some ratios beyond every bound, on both sides, for both signs of the advantage.
LENGTHS = [7, 3, 5, 6]
LOW, HIGH = 0.2, 0.28


def make(seed=0):
    """Packed float64 tensors of four sequences; one token in five is masked, the first of each is not."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)

    def random():
        return torch.randn(tokens, generator=generator, dtype=torch.float64)

    old = -random().abs() - 0.1
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    mask = torch.rand(tokens, generator=generator) > 0.2
    mask[offsets[:-1]] = True
    return SimpleNamespace(
        old=old,
        new=(old + 0.6 * random()).requires_grad_(),
        ref=old + 0.4 * random(),
        engine=old + 0.4 * random(),
        mask=mask,
        offsets=offsets,
        advantages=torch.tensor([1.0, -0.7, 0.4, -1.3], dtype=torch.float64),
    )


def pad(batch, values):
    """(B, T) of packed (N,), differentiable; 0 in the padding."""
    pieces = values.tensor_split(batch.offsets[1:-1])
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)


def ours(batch, kind, **options):
    return policy_loss(
        batch.new, batch.old, batch.advantages, mask=batch.mask, cu_seqlens=batch.offsets, kind=kind,
        **({"clip_low": LOW, "clip_high": HIGH} | options),
    )  # fmt: skip


def same(batch, mine, theirs, scale=1.0):
    assert float((mine - scale * theirs).detach().abs()) <= 1e-12
    gradients = [torch.autograd.grad(x, batch.new, retain_graph=True)[0] for x in (mine, scale * theirs)]
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-12


def trl_loss(batch, loss_type, *, level="token", beta=0.0, delta=None, weights=None, high=HIGH):
    """The loss GRPOTrainer computes for these log-probs, and its metrics."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl")
    logprobs, mask = pad(batch, batch.new), pad(batch, batch.mask.long())
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        importance_sampling_level=level, beta=beta, loss_type=loss_type, epsilon_low=LOW, epsilon_high=high,
        use_vllm=weights is not None, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        max_completion_length=11, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": batch.advantages, "old_per_token_logps": pad(batch, batch.old),
        "ref_per_token_logps": pad(batch, batch.ref), "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    return trainer.GRPOTrainer._compute_loss(stub, None, inputs), stub._metrics["train"]


TRL_KINDS = [
    ("grpo", "grpo", {}),
    ("dr_grpo", "dr_grpo", {"constant_length": 11}),
    ("dapo", "dapo", {}),
    ("grpo", "bnpo", {"aggregation": "token"}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "theirs", "options"), TRL_KINDS)
@pytest.mark.parametrize("extras", ["", "kl", "weights", "dual", "kl weights dual"])
def test_trl(kind, theirs, options, extras, seed):
    batch = make(seed)
    weights = (batch.old - batch.engine).exp().clamp(max=1.3)
    expected, metrics = trl_loss(
        batch, theirs, beta=0.3 if "kl" in extras else 0.0, delta=1.6 if "dual" in extras else None,
        weights=pad(batch, weights) if "weights" in extras else None,
    )  # fmt: skip
    result = ours(
        batch, kind, **options, ref_logprobs=batch.ref, kl_coef=0.3 if "kl" in extras else 0.0,
        clip_dual=1.6 if "dual" in extras else None, engine_logprobs=batch.engine,
        truncation=1.3 if "weights" in extras else None,
    )  # fmt: skip
    same(batch, result.loss, expected)
    assert result.metrics["clip_fraction_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert result.metrics["clip_fraction_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0])
    if "kl" in extras:
        assert result.metrics["kl_ref"] == pytest.approx(metrics["kl"][0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("theirs", ["grpo", "dapo"])
def test_trl_gspo(theirs, seed):
    """GSPO in TRL is importance_sampling_level="sequence"; the gradient through the mean is the same."""
    batch = make(seed)
    expected, _ = trl_loss(batch, theirs, level="sequence", beta=0.3)
    aggregation = {"grpo": "sequence", "dapo": "token"}[theirs]
    result = ours(batch, "gspo", aggregation=aggregation, ref_logprobs=batch.ref, kl_coef=0.3)
    same(batch, result.loss, expected)


@pytest.mark.parametrize("seed", range(3))
def test_trl_cispo(seed):
    """TRL's CISPO has an upper bound only, and its epsilon_high is the bound itself."""
    batch = make(seed)
    weights = (batch.old - batch.engine).exp().clamp(max=1.3)
    expected, _ = trl_loss(batch, "cispo", high=1.4, beta=0.3, weights=pad(batch, weights))
    result = ours(
        batch, "cispo", clip_low=1.0, clip_high=0.4, ref_logprobs=batch.ref, kl_coef=0.3,
        engine_logprobs=batch.engine, truncation=1.3,
    )  # fmt: skip
    same(batch, result.loss, expected)


def test_trl_counts_sequences_without_tokens():
    batch = make()
    batch.mask[7:10] = False
    expected, _ = trl_loss(batch, "grpo")
    same(batch, ours(batch, "grpo").loss, expected, scale=4 / 3)
    same(batch, ours(batch, "grpo", denominator=4).loss, expected)


def test_trl_spreads_importance_weights_of_gspo():
    """Equal within a sequence, they are the same; else TRL's gradient takes their mean, ours each token's own."""
    batch = make()
    per_sequence = torch.tensor([0.9, 1.2, 1.0, 0.7], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    for weights, equal in ((per_sequence, True), ((batch.old - batch.engine).exp(), False)):
        expected, _ = trl_loss(batch, "grpo", level="sequence", weights=pad(batch, weights))
        result = ours(batch, "gspo", engine_logprobs=batch.old - weights.log(), truncation=1e6)
        assert float((result.loss - expected).detach().abs()) <= 1e-12
        mine, theirs = (torch.autograd.grad(x, batch.new)[0] for x in (result.loss, expected))
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12) == equal
        sums = (pad(batch, x).sum(1) for x in (mine, theirs))
        assert torch.allclose(*sums, rtol=0, atol=1e-12)


MODES = {
    "token": ("token-mean", {}),
    "sequence": ("seq-mean-token-mean", {}),
    "constant": ("seq-mean-token-sum-norm", {"constant_length": 9}),
}


def verl_loss(batch, name, mode, *, dual=3.0, weights=None, kl=None, kl_coef=0.0):
    """The loss verl's actor computes: policy loss plus kl_coef times the aggregated KL."""
    algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl")
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=LOW, clip_ratio_high=HIGH,
        clip_ratio_c=dual, global_batch_info={"loss_scale_factor": 9},
    )  # fmt: skip
    mask = pad(batch, batch.mask.double())
    arguments = (pad(batch, batch.old), pad(batch, batch.new), batch.advantages[:, None].expand_as(mask), mask)
    loss, metrics = algos.get_policy_loss_fn(name)(
        *arguments, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )
    if kl is not None:
        values = algos.kl_penalty(arguments[1], pad(batch, batch.ref), kl)
        loss = loss + kl_coef * algos.agg_loss(values, mask, mode, loss_scale_factor=9)
    return loss, metrics


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "theirs"), [("grpo", "vanilla"), ("gspo", "gspo"), ("cispo", "cispo")])
@pytest.mark.parametrize("aggregation", list(MODES))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual", [1.5, 1e9])
def test_verl(kind, theirs, aggregation, estimator, dual, seed):
    batch = make(seed)
    mode, options = MODES[aggregation]
    weights = (batch.old - batch.engine).exp().clamp(max=1.3)
    expected, metrics = verl_loss(
        batch, theirs, mode, dual=dual, weights=pad(batch, weights), kl=estimator, kl_coef=0.3
    )
    result = ours(
        batch, kind, aggregation=aggregation, **options, clip_dual=dual if kind == "grpo" else None,
        ref_logprobs=batch.ref, kl_coef=0.3, kl_estimator=estimator, engine_logprobs=batch.engine, truncation=1.3,
    )  # fmt: skip
    # verl divides token sums by length + 1e-8, which moves "seq-mean-token-mean" by 1e-8 relative.
    tolerance = 1e-7 if aggregation == "sequence" else 1e-12
    assert float((result.loss - expected).detach().abs()) <= tolerance
    mine, other = (torch.autograd.grad(x, batch.new)[0] for x in (result.loss, expected))
    assert float((mine - other).abs().max()) <= tolerance
    clipped = result.metrics["clip_fraction_low"] + result.metrics["clip_fraction_high"]
    assert clipped == pytest.approx(metrics["actor/pg_clipfrac"])
    if kind == "grpo":
        assert result.metrics.get("clip_fraction_dual", 0.0) == pytest.approx(metrics["actor/pg_clipfrac_lower"])


def test_verl_bounds_k3():
    """Beyond 10 verl's k3 estimate is constant; ours still has the gradient that pulls the policy back."""
    batch = make()
    batch.ref = batch.new.detach() + 3.0  # k3 = e^3 - 4 = 16.1
    (theirs,) = torch.autograd.grad(verl_loss(batch, "vanilla", "token-mean", kl="k3", kl_coef=1.0)[0], batch.new)
    plain = torch.autograd.grad(verl_loss(batch, "vanilla", "token-mean")[0], batch.new)[0]
    assert torch.equal(theirs, plain)
    options = {"aggregation": "token", "clip_dual": 3.0, "ref_logprobs": batch.ref}
    with_kl, without = (
        torch.autograd.grad(ours(batch, "grpo", kl_coef=coef, **options).loss, batch.new)[0] for coef in (1.0, 0.0)
    )
    assert torch.allclose(without, plain)
    expected = batch.mask * (1 - torch.tensor(3.0).double().exp()) / batch.mask.sum()
    assert torch.allclose(with_kl - without, expected)
