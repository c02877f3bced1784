"""Losses by name: registered ones equal the fused kinds, are found in files and modules, and mistakes are named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hiexp.rl import losses
from hiexp.rl.config import TrainConfig
from hiexp.rl.losses import BUILT_IN, Recipe, find_loss, register

# A bounded gradient: a huge first update blows rounding up in the second.
SEVERAL = {"epochs": 2, "minibatches": 2, "clip_low": 0.01, "importance_cap": 1.05, "max_grad_norm": 1.0}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "training_losses.md"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Names registered by a test are gone after it."""
    monkeypatch.setattr(losses, "_RECIPES", dict(losses._RECIPES))


def own_grpo(batch):
    ratio = batch.ratio()
    bounded = ratio.clamp(1 - batch.settings["clip_low"], 1 + batch.settings["clip_high"])
    return -torch.minimum(ratio * batch.advantages, bounded * batch.advantages)


def own_cispo(batch):
    bounded = batch.ratio().clamp(1 - batch.settings["clip_low"], 1 + batch.settings["clip_high"])
    return -bounded.detach() * batch.advantages * batch.logprobs


def own_gspo(batch):
    difference = batch.logprobs - batch.old_logprobs
    mean = batch.sequence_mean(difference.detach())
    ratio = (mean + batch.logprobs - batch.logprobs.detach()).exp()
    bounded = ratio.clamp(1 - batch.settings["clip_low"], 1 + batch.settings["clip_high"])
    return -torch.minimum(ratio * batch.advantages, bounded * batch.advantages)


@pytest.mark.parametrize(
    ("kind", "function", "aggregation"),
    [("grpo", own_grpo, "sequence"), ("dr_grpo", own_grpo, "constant"), ("rloo", own_grpo, "sum"),
     ("cispo", own_cispo, "token"), ("gspo", own_gspo, "sequence")],
)  # fmt: skip
@pytest.mark.parametrize("several", [{}, SEVERAL])
def test_a_registered_loss_equals_the_fused_kind(updated, ragged, kind, function, aggregation, several):
    rollouts, advantages = ragged(), np.random.default_rng(1).normal(size=7)
    register("own", aggregation=aggregation)(function)
    _, before, fused, expected = updated(rollouts, advantages, kind=kind, tokens_per_microbatch=45, **several)
    _, _, own, metrics = updated(rollouts, advantages, kind="own", tokens_per_microbatch=45, **several)
    assert (fused - before).abs().max() > 1e-5
    torch.testing.assert_close(own, fused, atol=2e-6, rtol=1e-4)
    # Clip shares and the KL to the old policy are those of single tokens, whatever the loss.
    skipped = {"importance_cut", *(key for key in expected if kind != "grpo" and key.startswith(("clip", "approx")))}
    shared = {key: value for key, value in metrics.items() if key not in skipped}
    assert shared == pytest.approx({key: value for key, value in expected.items() if key not in skipped}, rel=1e-3)


def test_metrics_of_a_loss_are_means_over_tokens(updated, ragged):
    @register("tells", aggregation="token")
    def tells(batch):
        assert batch.mask.all()
        assert batch.settings["shift"] == 2.5
        return -batch.advantages * batch.logprobs - 0.01 * batch.entropy, {"two": torch.full_like(batch.logprobs, 2.0)}

    rollouts = ragged()
    metrics = updated(rollouts, np.ones(7), kind="tells", loss_settings={"shift": 2.5}, tokens_per_microbatch=30)[3]
    assert metrics["loss/two"] == pytest.approx(2.0)
    assert metrics["trained_tokens"] == sum(sum(rollout.loss_mask) for rollout in rollouts)


def test_the_entropy_has_a_gradient(updated, ragged):
    register("entropy")(lambda batch: -batch.entropy)
    _, before, after, metrics = updated(ragged(), np.zeros(7), kind="entropy", kl_coef=0.0)
    assert (after - before).abs().max() > 1e-6
    assert metrics["loss"] < 0


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda b: b.logprobs.sum(),
            ValueError,
            r"loss 'bad': expected losses of shape \(\d+,\), one a token, got \(\)",
        ),
        (lambda b: 3.0, TypeError, "loss 'bad': expected losses to be a tensor"),
        (lambda b: b.advantages, ValueError, "depend on batch.logprobs"),
        (lambda b: (b.logprobs, [1]), TypeError, "expected metrics as a mapping"),
        (lambda b: (b.logprobs, {"x": 1.0}), TypeError, "expected x to be a tensor"),
    ],
)
def test_what_a_loss_returns_is_checked(updated, ragged, returned, error, message):
    def bad(batch):
        return returned(batch)

    register("bad")(bad)
    with pytest.raises(error, match=message):
        updated(ragged(), np.ones(7), kind="bad")


def test_a_loss_in_a_file_needs_no_fork(tmp_path, updated, ragged):
    file = tmp_path / "mine.py"
    file.write_text("def plain(batch):\n    return -batch.advantages * batch.logprobs\n")
    config = TrainConfig.from_dict({"algorithm": {"kind": f"{file}:plain"}})
    recipe = find_loss(config.algorithm.kind)
    assert (recipe.fused, recipe.aggregation) == (None, "sequence")
    rollouts, advantages = ragged(), np.random.default_rng(2).normal(size=7)
    own = updated(rollouts, advantages, kind=config.algorithm.kind)[2]
    torch.testing.assert_close(own, updated(rollouts, advantages)[2], atol=2e-6, rtol=1e-4)


def test_a_registered_function_of_a_file_keeps_its_settings(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from hiexp.rl.losses import register\n\n\n"
        "@register('mine', aggregation='token', advantages='rloo')\ndef mine(batch):\n    return batch.logprobs\n"
    )
    for _ in range(2):
        recipe = find_loss(f"{file}:mine")
    assert (recipe.aggregation, recipe.preset) == ("token", "rloo")
    assert find_loss("mine") == recipe


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("grop", "algorithm.kind: expected one of grpo, .* got 'grop'; did you mean 'grpo'"),
        ("/nowhere/mine.py:f", "algorithm.kind: no such file: /nowhere/mine.py"),
        ("no.such.module:f", "no.such.module cannot be loaded .ModuleNotFoundError"),
        (
            "hiexp.rl.losses:nothing",
            "expected a function 'nothing' in hiexp.rl.losses, got none; callable there: .*find_loss",
        ),
        ("hiexp.rl.losses:AGGREGATIONS", "got tuple"),
    ],
)
def test_a_loss_that_is_not_there_is_told_when_the_config_is_read(kind, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"algorithm": {"kind": kind}})


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise KeyError('x')\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be loaded \(KeyError"):
        find_loss(f"{file}:f")


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="loss 'grpo': the name is taken by a built-in kind"):
        register("grpo")(own_grpo)
    register("mine")(own_grpo)
    register("mine")(own_grpo)
    with pytest.raises(ValueError, match=r"loss 'mine': the name is taken by .*own_grpo"):
        register("mine")(own_cispo)
    with pytest.raises(ValueError, match="aggregation: expected one of token"):
        register("other", aggregation="mean")
    with pytest.raises(ValueError, match="name: expected a name without"):
        register("a:b")


def test_built_in_kinds_are_those_of_the_fused_loss():
    from hiexp.ops._policy_batch import DEFAULT_AGGREGATION
    from hiexp.ops.group_advantage import PRESETS

    assert {find_loss(kind).fused for kind in BUILT_IN} == set(DEFAULT_AGGREGATION)
    for kind, aggregation in DEFAULT_AGGREGATION.items():
        assert find_loss(kind).aggregation == aggregation
    assert {find_loss(kind).preset for kind in BUILT_IN} <= {None, *PRESETS}
    assert find_loss("rloo") == Recipe("grpo", "sum", "rloo")


def test_rloo_is_reinforce_on_the_whole_rollout(updated, ragged):
    """Gradient of -1/S sum_i A_i sum_t log pi, made by hand from the model's own logits."""
    rollouts, advantages = ragged(), np.random.default_rng(3).normal(size=7)
    kept = []

    def prepare(update):
        import copy

        kept.append(copy.deepcopy(update.scorer.model))

    _, before, after, _ = updated(rollouts, advantages, kind="rloo", kl_coef=0.0, prepare=prepare)
    model = kept[0]
    loss = 0
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        ids = torch.tensor([rollout.token_ids])
        logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double() / 0.9, -1)
        picked = logs.gather(1, ids[0, 1:, None]).squeeze(1) * torch.tensor(rollout.loss_mask[1:])
        loss = loss - advantage * picked.sum() / len(rollouts)
    loss.backward()
    gradient = torch.cat([weight.grad.reshape(-1) for weight in model.parameters()])
    torch.testing.assert_close((before - after) / 0.01, gradient, atol=1e-4, rtol=1e-3)


def test_the_page_s_example_runs(updated, ragged, tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    file = tmp_path / "my_losses.py"
    file.write_text(code)
    (name,) = re.findall(r"kind: my_losses.py:(\w+)", text)
    (yaml_settings,) = re.findall(r"loss_settings: \{(\w+): ([\d.]+)\}", text)
    settings = {yaml_settings[0]: float(yaml_settings[1])}
    rollouts, advantages = ragged(), np.random.default_rng(4).normal(size=7)
    several = {"epochs": 2, "loss_settings": settings, "tokens_per_microbatch": 45}
    _, before, after, metrics = updated(rollouts, advantages, kind=f"{file}:{name}", **several)
    assert (after - before).abs().max() > 1e-5
    assert any(key.startswith("loss/") for key in metrics)
    for kind in BUILT_IN:
        assert f"`{kind}`" in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "grpo"}, (0.2, 0.2)),
        ({"kind": "dr_grpo"}, (0.2, 0.2)),
        ({"kind": "rloo"}, (0.2, 0.2)),
        ({"kind": "dapo"}, (0.2, 0.28)),
        ({"kind": "gspo"}, (3e-4, 4e-4)),
        ({"kind": "cispo"}, (1.0, 4.0)),
        ({"kind": "gspo", "clip_high": 0.1}, (3e-4, 0.1)),
        # As before the kinds had ranges of their own.
        ({"kind": "grpo", "clip_low": 0.3}, (0.3, 0.3)),
        ({"kind": "dapo", "clip_low": 0.1}, (0.1, 0.28)),
        ({"kind": "gspo", "clip_low": 0.2}, (0.2, 0.2)),
        ({"kind": "cispo", "clip_low": 0.2, "clip_high": 0.4}, (0.2, 0.4)),
    ],
)
def test_each_kind_has_its_clip_range(settings, expected):
    assert TrainConfig.from_dict({"algorithm": settings}).algorithm.clip_range == expected


def test_the_range_of_a_registered_loss():
    register("narrow", clip=(0.01, 0.02))(own_grpo)
    assert TrainConfig.from_dict({"algorithm": {"kind": "narrow"}}).algorithm.clip_range == (0.01, 0.02)


def test_the_update_clips_at_the_kinds_own_range(updated, ragged):
    """Two updates on the same rollouts: in the second the mean ratios have left gspo's range, none has left 0.2."""
    advantages = np.random.default_rng(1).normal(size=7)
    several = {"epochs": 2, "lr": 1e-5}
    *_, own = updated(ragged(), advantages, kind="gspo", **several)
    *_, wide = updated(ragged(), advantages, kind="gspo", clip_low=0.2, **several)
    assert own["clip_fraction"] > 0 == wide["clip_fraction"]
    *_, cispo = updated(ragged(), advantages, kind="cispo", **several)
    *_, token = updated(ragged(), advantages, kind="cispo", clip_low=1e-4, **several)
    assert cispo["clip_fraction"] == 0 < token["clip_fraction"]
