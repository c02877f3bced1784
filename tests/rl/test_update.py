"""The update's choices: what the ratio is taken to, importance weights, the KL term and its controller."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hiexp.rl.config import TrainConfig
from hiexp.rl.importance import importance_weights
from hiexp.rl.metrics import TIME_KEYS, read_metrics
from hiexp.rl.reward import TaskBatch
from hiexp.rl.trainer import GRPOTrainer
from hiexp.tasks.question import Question

ADVANTAGES = np.random.default_rng(1).normal(size=7)


def own_gradient(model, rollouts, loss_of):
    """Gradient of the mean over rollouts of ``loss_of(i, log-probs of the trained tokens, float64)``."""
    total = 0
    for i, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double() / 0.9, -1)
        picked = logs.gather(1, ids[0, 1:, None]).squeeze(1)
        total = total + loss_of(i, picked[torch.tensor(rollout.loss_mask[1:], dtype=torch.bool)]) / len(rollouts)
    total.backward()
    return torch.cat([weight.grad.reshape(-1) for weight in model.parameters()])


def engine_of(rollout):
    return torch.tensor([p for p, m in zip(rollout.logprobs, rollout.loss_mask, strict=True) if m], dtype=torch.float64)


def near(updated, rollouts):
    """The rollouts with engine log-probs that differ from the policy's by about 0.2 nats."""
    kept, rng = [], np.random.default_rng(5)
    updated(rollouts, ADVANTAGES, prepare=lambda update: kept.append(update.score(rollouts, range(7), 1, whole=True)))
    for i, rollout in enumerate(rollouts):
        gaps = iter((kept[0].old[i] + torch.tensor(rng.normal(0, 0.2, len(kept[0].old[i])))).tolist())
        rollout.logprobs = [next(gaps) if sampled else 0.0 for sampled in rollout.loss_mask]
    return rollouts


def run_and_compare(updated, rollouts, loss_of, **settings):
    kept = []
    prepare = lambda update: kept.append(copy.deepcopy(update.scorer.model))  # noqa: E731
    _, before, after, metrics = updated(rollouts, ADVANTAGES, kl_coef=0.0, prepare=prepare, **settings)
    expected = own_gradient(kept[0], rollouts, loss_of)
    torch.testing.assert_close((before - after) / 0.01, expected, atol=2e-4, rtol=2e-3)
    return metrics


@pytest.mark.parametrize("how", [{"run": {"staleness": 1}}, {"old_logprobs": "engine"}])
def test_stale_rollouts_have_their_ratio_to_the_engine(updated, ragged, how):
    """The wrong answer, ratio 1, would give another gradient: some ratios here are clipped."""
    rollouts = near(updated, ragged())

    def clipped(i, logprobs):
        ratio, advantage = (logprobs - engine_of(rollouts[i])).exp(), ADVANTAGES[i]
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    metrics = run_and_compare(updated, rollouts, clipped, **how)
    assert metrics["clip_fraction"] == pytest.approx(metrics["clip_fraction_low"] + metrics["clip_fraction_high"])
    assert metrics["clip_fraction"] > 0.1
    # The mismatch is that of the trainer, not of the ratio's denominator.
    assert metrics["engine_mismatch"] > 0.1


def test_fresh_rollouts_and_importance_cap_keep_the_trainer_s_ratio(updated, ragged):
    rollouts = near(updated, ragged())

    def weighed(i, logprobs):
        rho = (logprobs.detach() - engine_of(rollouts[i])).exp().clamp(max=1.1)
        return -(rho * logprobs * ADVANTAGES[i]).mean()

    run_and_compare(updated, rollouts, weighed, importance_cap=1.1, run={"staleness": 1})
    run_and_compare(updated, rollouts, lambda i, logprobs: -(logprobs * ADVANTAGES[i]).mean())


@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"])
def test_importance_modes(updated, ragged, mode):
    rollouts, cuts = near(updated, ragged()), []

    def weighed(i, logprobs):
        offsets = torch.tensor([0, len(logprobs)])
        weights, cut = importance_weights(logprobs.detach(), engine_of(rollouts[i]), offsets, mode, 1.15)
        cuts.extend(cut.tolist())
        return -(weights * logprobs * ADVANTAGES[i]).mean()

    metrics = run_and_compare(updated, rollouts, weighed, importance_mode=mode, importance_cap=1.15)
    assert 0 < metrics["importance_cut"] < 1
    assert metrics["importance_cut"] == pytest.approx(np.mean(cuts))


def test_mismatch_by_hand(updated, ragged):
    rollouts, gaps = near(updated, ragged()), []

    def plain(i, logprobs):
        gaps.extend((logprobs.detach() - engine_of(rollouts[i])).abs().tolist())
        return -(logprobs * ADVANTAGES[i]).mean()

    metrics = run_and_compare(updated, rollouts, plain, tokens_per_microbatch=45)
    assert metrics["engine_mismatch"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert metrics["engine_mismatch_max"] == pytest.approx(np.max(gaps), rel=1e-4)
    assert metrics["engine_mismatch_share"] == pytest.approx(np.mean(np.array(gaps) > 0.1))


@pytest.mark.parametrize("how", [{"run": {"staleness": 1}}, {"old_logprobs": "engine"}, {}])
def test_mismatch_is_that_of_the_weights_before_the_first_update(updated, ragged, how):
    """Large steps between the minibatches; log-probs after one of them are another policy's."""
    rollouts, kept = near(updated, ragged()), []

    def prepare(update):
        update.optimizer.param_groups[0]["lr"] = 1.0
        update._set_learning_rate = lambda step: 1.0
        kept.append(update._score_all(update.scorer, rollouts, range(7), 1))

    metrics = updated(rollouts, ADVANTAGES, kl_coef=0.0, prepare=prepare, minibatches=3, epochs=2, **how)[3]
    # Where the ratio is taken to the engine, nothing is scored before; then the first minibatch tells.
    first = np.array_split(np.random.default_rng([0, 1, 0]).permutation(7), 3)[0] if how else range(7)
    gaps = torch.cat([(kept[0][i] - engine_of(rollouts[i])).abs() for i in first])
    assert metrics["engine_mismatch"] == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert metrics["engine_mismatch_max"] == pytest.approx(float(gaps.max()), rel=1e-4)
    assert metrics["trained_tokens"] == sum(sum(rollout.loss_mask) for rollout in rollouts)


def test_kl_in_the_reward_is_the_sum_over_tokens_and_leaves_the_loss(updated, ragged):
    rollouts, kept = ragged(), []

    def prepare(update):
        scores = update.score(rollouts, range(7), 1, whole=True)
        kept.append((update.kl_penalty(scores, 7), scores, copy.deepcopy(update.reference.model)))

    plain = updated(rollouts, ADVANTAGES, kl_coef=0.0)[2]
    _, _, weights, metrics = updated(rollouts, ADVANTAGES, kl_coef=0.3, kl_in_reward=True, prepare=prepare)
    torch.testing.assert_close(weights, plain)
    assert metrics["kl_ref"] > 0
    penalty, scores, _ = kept[0]
    by_hand = [0.3 * float((scores.old[i] - scores.reference[i]).double().sum()) for i in range(7)]
    assert penalty.tolist() == pytest.approx(by_hand)
    assert any(penalty)


def test_the_adaptive_coefficient_is_used_reported_and_kept(updated, ragged):
    rollouts = ragged()
    settings = {"kl_target": 1e-6, "kl_horizon": 7.0, "kl_coef": 0.1}
    update, _, _, metrics = updated(rollouts, ADVANTAGES, **settings)
    assert metrics["kl_coef"] == 0.1
    assert update.kl.coefficient == pytest.approx(0.12)
    state = update.state_dict()
    _, _, weights, metrics = updated(
        rollouts, ADVANTAGES, prepare=lambda update: update.load_state_dict(state), **settings
    )
    assert metrics["kl_coef"] == pytest.approx(0.12)
    torch.testing.assert_close(weights, updated(rollouts, ADVANTAGES, kl_coef=0.12)[2])


class ColourTask:
    def training(self, step, count):
        return TaskBatch([Question(f"{step}/{i}", "colour of sky ?", ("red",)) for i in range(count)])

    def evaluation(self):
        return []

    def score(self, question, answer):
        return {"em": float(answer == "red")}


def test_a_run_with_everything_on_equals_itself_continued(tiny_run, tmp_path):
    def config(name, steps):
        return TrainConfig.from_dict(tiny_run.config(
            tmp_path / name,
            algorithm={"kind": "rloo", "kl_coef": 0.05, "kl_target": 0.001, "kl_horizon": 18.0, "minibatches": 2,
                       "importance_cap": 2.0, "importance_mode": "sequence_truncate"},
            credit={"kl_in_reward": True, "overlong_buffer": 12, "sampling_rounds": 2, "filter_high": 0.9},
            run={"steps": steps, "checkpoint_every": 1},
        ))  # fmt: skip

    whole = GRPOTrainer(config("whole", 3), task=ColourTask())
    whole.train()
    GRPOTrainer(config("parts", 1), task=ColourTask()).train()
    parts = GRPOTrainer(config("parts", 3), task=ColourTask())
    parts.train()
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for row in [*first, *second]:
        for key in TIME_KEYS:
            del row[key]
    assert first == second
    assert len({row["kl_coef"] for row in first}) > 1
    assert all(row["kl_penalty"] is not None and row["overlong_penalty"] > 0 for row in first)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_trains_nothing_is_observed(updated, ragged):
    """As the update would have measured its rollouts; no gradient is left behind."""
    rollouts, kept = near(updated, ragged()), []
    *_, trained = updated(
        rollouts, ADVANTAGES, prepare=lambda update: kept.append((update, update.observe(rollouts, 1)))
    )
    seen = kept[0][1]
    measured = {"entropy", "kl_ref", *(f"engine_mismatch{end}" for end in ("", "_max", "_share"))}
    assert seen.keys() == measured | {"oom_retries"}
    assert seen == pytest.approx({key: trained[key] for key in seen}, rel=1e-4)
    assert all(weight.grad is None for weight in kept[0][0].scorer.parameters())
    many = [rollouts[i % 7] for i in range(40)]
    assert kept[0][0].observe(many, 2)["entropy"] > 0
    assert kept[0][0].observe([], 3) == {"oom_retries": 0}


def test_a_collapsed_policy_does_not_blind_the_entropy_alarm(tiny_run, tmp_path):
    """All answers are worth the same, so no group has variance and nothing is trained."""

    class Indifferent:
        def training(self, step, count):
            return TaskBatch([Question(f"q{step}{i}", "colour of sky ?", ("red",)) for i in range(count)])

        def evaluation(self):
            return []

        def score(self, question, answer):
            return {"em": 0.0}

    settings = tiny_run.config(tmp_path / "run", run={"steps": 1}, task={"malformed_reward": 0.0})
    row = GRPOTrainer(TrainConfig.from_dict(settings), task=Indifferent()).train()
    assert row["zero_variance_share"] == 1.0
    assert row["trained_tokens"] is None
    assert row["entropy"] > 0.1
    assert row["engine_mismatch"] < 1e-4
    assert row["kl_ref"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_weights_that_were_cut_are_counted_in_every_mode(updated, ragged, mode):
    rollouts = near(updated, ragged())
    *_, off = updated(rollouts, ADVANTAGES)
    assert "importance_cut" not in off
    *_, metrics = updated(rollouts, ADVANTAGES, importance_cap=1.1, importance_mode=mode)
    kept = []
    updated(rollouts, ADVANTAGES, prepare=lambda update: kept.append(update.score(rollouts, range(7), 1, whole=True)))
    gaps = torch.cat([kept[0].old[i].double() - engine_of(rollouts[i]) for i in range(7)])
    assert 0 < metrics["importance_cut"] < 1
    assert metrics["importance_cut"] == pytest.approx(float((gaps.exp() > 1.1).double().mean()))


def test_an_optimiser_out_of_memory_says_what_helps(updated, ragged):
    def prepare(update):
        def full():
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes")

        update.optimizer.step = full

    with pytest.raises(MemoryError, match=r"step 1, optimiser: out of memory .*model.lora_rank.*same command") as found:
        updated(ragged(), ADVANTAGES, prepare=prepare)
    assert "micro-batch" not in str(found.value)
