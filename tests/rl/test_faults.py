"""A loss that is not finite: nothing is stepped, the rollouts are named, the batch can be read from the dump."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from hiexp.rl.faults import NonFiniteError


def spoil(place, kept):
    """Make the hidden states of the rollout at ``place`` of a batch NaN."""

    def prepare(update):
        from hiexp.rl import scorer as module

        kept.append((update, copy.deepcopy(update.scorer.model.state_dict())))
        original = module.trained_hidden_states

        def broken(model, batch):
            hidden = original(model, batch).clone()
            for b, i in enumerate(batch.indices):
                if i == place:
                    hidden[batch.cu_seqlens[b]] = float("nan")
            return hidden

        kept.append(broken)

    return prepare


@pytest.mark.parametrize("budget", [10_000, 30])
def test_a_nan_stops_before_the_step_and_names_the_rollout(updated, ragged, monkeypatch, tmp_path, budget):
    rollouts, kept = ragged(), []
    prepare = spoil(4, kept)

    def patched(update):
        prepare(update)
        monkeypatch.setattr("hiexp.rl.scorer.trained_hidden_states", kept[1])

    advantages, rewards = np.arange(7.0), np.linspace(0, 1, 7)
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss is not finite \(nan\); .* q4/0/0\. .*did not step"
    ) as caught:
        updated(
            rollouts, advantages, kl_coef=0.0, faults=tmp_path / "faults", tokens_per_microbatch=budget,
            prepare=patched, run={"rewards": rewards},
        )  # fmt: skip
    update, weights = kept[0]
    assert all(torch.equal(weights[name], value) for name, value in update.scorer.model.state_dict().items())
    assert all(weight.grad is None for weight in update.scorer.model.parameters())
    error = caught.value
    assert error.rollout_ids == ["q4/0/0"]
    assert error.path == tmp_path / "faults" / "step_000001.json"
    dump = json.loads(error.path.read_text())
    rows = {row["rollout_id"]: row for row in dump["rollouts"]}
    bad = rows["q4/0/0"]
    assert [name for name, row in rows.items() if row["non_finite"]] == ["q4/0/0"]
    assert (bad["reward"], bad["advantage"]) == (pytest.approx(4 / 6), 4.0)
    assert bad["token_ids"] == rollouts[4].token_ids
    assert bad["trained_positions"] == [t for t, sampled in enumerate(rollouts[4].loss_mask) if sampled]
    assert bad["logprobs"][0] == "nan"
    assert len(bad["logprobs"]) == len(bad["engine"]) == len(bad["trained_positions"])
    assert bad["engine"] == pytest.approx([rollouts[4].logprobs[t] for t in bad["trained_positions"]])


@pytest.mark.parametrize("budget", [10_000, 30])
def test_a_gradient_that_is_not_finite_is_dumped_with_all_it_is_the_sum_of(updated, ragged, tmp_path, budget):
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite .*none with a token that is not finite"):
        updated(ragged(), np.full(7, 1e38), kl_coef=0.0, faults=tmp_path, tokens_per_microbatch=budget)
    rows = json.loads((tmp_path / "step_000001.json").read_text())["rollouts"]
    assert sorted(row["rollout_id"] for row in rows) == [f"q{i}/0/0" for i in range(7)]


def test_without_a_run_directory_nothing_is_written(updated, ragged):
    with pytest.raises(NonFiniteError) as caught:
        updated(ragged(), np.full(7, float("nan")), kl_coef=0.0)
    assert caught.value.path is None
    assert len(caught.value.rollout_ids) == 7
    assert "and 2 more" in str(caught.value)
