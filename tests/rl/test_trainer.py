"""The trainer: its loss does not depend on batching, it learns, it keeps its layout, and bad input is refused."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hiexp.agent.record import Rollout
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.io import DataError
from hiexp.rl import update as update_module
from hiexp.rl.config import AlgorithmConfig, TrainConfig
from hiexp.rl.metrics import METRIC_KEYS, read_metrics
from hiexp.rl.model import load_policy
from hiexp.rl.reward import QuestionTask, TaskBatch
from hiexp.rl.scorer import PolicyScorer
from hiexp.rl.trainer import GRPOTrainer
from hiexp.rl.update import PolicyUpdate
from hiexp.tasks.question import Question
from hiexp.tasks.scorers import Scorer


def make_rollouts(n=7, seed=0):
    """Ragged rollouts over random tokens, some of them masked, with engine log-probs near a uniform policy's."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for i in range(n):
        length = int(rng.integers(4, 20))
        mask = [0, 0, 1, *(rng.random(length - 3) < 0.6).astype(int).tolist()]
        tokens = rng.integers(4, 30, length).tolist()
        logprobs = [float(-3.3 * m) for m in mask]
        rollouts.append(
            Rollout(f"q{i}/0/0", f"q{i}", "?", tokens, mask, logprobs, [], [], [], None, i, 0, "hiexp", "answer", "x")
        )
    return rollouts


def run_update(tiny_run, budget, **settings):
    """Weights and metrics after one PolicyUpdate with micro-batches of ``budget`` tokens."""
    config = TrainConfig.from_dict(tiny_run.config("unused"))
    model, _ = load_policy(config.model)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for i, weight in enumerate(reference.parameters()):
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    algorithm = AlgorithmConfig(**{"lr": 1e-2, "kl_coef": 0.1, "tokens_per_microbatch": budget, **settings})
    # SGD keeps the update proportional to the gradient; Adam would blow rounding up to the learning rate.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scorer = PolicyScorer(model, 0.9)
    update = PolicyUpdate(
        scorer,
        PolicyScorer(reference, 0.9),
        optimizer,
        Accelerator(cpu=True),
        algorithm,
        pad_id=0,
        constant_length=20,
        seed=0,
    )
    rollouts = make_rollouts()
    advantages = np.random.default_rng(1).normal(size=len(rollouts))
    metrics = update.run(rollouts, advantages, [0, 1, 2, 4, 5, 6], step=1)
    return torch.cat([weight.detach().reshape(-1) for weight in model.parameters()]), metrics


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("several", [{}, {"epochs": 2, "minibatches": 2}])
def test_the_update_does_not_depend_on_micro_batches(tiny_run, kind, several):
    whole, metrics = run_update(tiny_run, 10_000, kind=kind, **several)
    start = run_update(tiny_run, 10_000, kind=kind, max_grad_norm=1e-12, **several)[0]
    assert (whole - start).abs().max() > 1e-5
    for budget in (1, 45):
        pieces, piece_metrics = run_update(tiny_run, budget, kind=kind, **several)
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-4)
        assert piece_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_reusing_the_current_logprobs_as_old_ones_changes_nothing(tiny_run, monkeypatch):
    reused, metrics = run_update(tiny_run, 45)
    monkeypatch.setattr(PolicyUpdate, "_several_updates", True)
    recomputed, again = run_update(tiny_run, 45)
    # The two ways to the log-probs round differently.
    torch.testing.assert_close(reused, recomputed, atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert metrics["approx_kl"] == 0.0
    assert metrics["kl_ref"] > 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("several", [{}, {"epochs": 2, "minibatches": 2}])
def test_packing_common_prefixes_changes_nothing(tiny_run, monkeypatch, several, checkpointing):
    def load_checkpointed(config, load_policy=load_policy):
        model, tokenizer = load_policy(config)
        model.gradient_checkpointing_enable()
        return model.train(), tokenizer

    if checkpointing:
        monkeypatch.setattr(sys.modules[__name__], "load_policy", load_checkpointed)
    groups = [make_rollouts(4, seed) for seed in (0, 1)]
    for group in groups:
        for rollout in group[1:]:
            rollout.token_ids[:3] = group[0].token_ids[:3]
    monkeypatch.setattr(sys.modules[__name__], "make_rollouts", lambda: [*groups[0], *groups[1]])
    shapes = []
    original = update_module.microbatches

    def watched(*args, packed, **kwargs):
        batches = original(*args, packed=packed, **kwargs)
        shapes.extend((packed, batch.input_ids.numel()) for batch in batches)
        return batches

    monkeypatch.setattr(update_module, "microbatches", watched)
    packed, metrics = run_update(tiny_run, 10_000, **several)
    monkeypatch.setattr(update_module, "packs_prefixes", lambda model: False)
    padded, expected = run_update(tiny_run, 10_000, **several)
    assert sum(n for way, n in shapes if way) < sum(n for way, n in shapes if not way)
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_nothing_to_train_leaves_the_weights_alone(tiny_run):
    config = TrainConfig.from_dict(tiny_run.config("unused"))
    model, _ = load_policy(config.model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1.0)
    update = PolicyUpdate(
        PolicyScorer(model, 1.0),
        None,
        optimizer,
        Accelerator(cpu=True),
        AlgorithmConfig(lr=1.0),
        pad_id=0,
        constant_length=20,
        seed=0,
    )
    assert update.run(make_rollouts(), np.zeros(7), [], step=1) == {"lr": 1.0}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_warm_up_raises_the_learning_rate(tiny_run):
    config = TrainConfig.from_dict(tiny_run.config("unused"))
    model, _ = load_policy(config.model)
    update = PolicyUpdate(
        PolicyScorer(model, 1.0), None, torch.optim.AdamW(model.parameters()), Accelerator(cpu=True),
        AlgorithmConfig(lr=0.4, warmup_steps=4), pad_id=0, constant_length=20, seed=0,
    )  # fmt: skip
    lrs = [update.run([], np.zeros(0), [], step)["lr"] for step in range(1, 7)]
    assert lrs == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_run):
    config = TrainConfig.from_dict(tiny_run.config("unused"))
    model, _ = load_policy(config.model)
    before = copy.deepcopy(model.state_dict())
    update = PolicyUpdate(
        PolicyScorer(model, 1.0), None, torch.optim.AdamW(model.parameters()), Accelerator(cpu=True),
        AlgorithmConfig(kl_coef=0.0), pad_id=0, constant_length=20, seed=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="step 3: the gradient is not finite"):
        update.run(make_rollouts(), np.full(7, 1e38), list(range(7)), step=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_with_experience_in_half_of_each_group(tiny_run, tmp_path, hek_path):
    config = TrainConfig.from_dict(
        tiny_run.config(
            tmp_path / "run", experience={"hek": str(hek_path), "experience_share": 0.5, "e1_threshold": -1.0}
        )
    )
    trainer = GRPOTrainer(config)
    events = []
    last = trainer.train(lambda kind, row: events.append(kind))
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [list(row) == list(METRIC_KEYS) for row in rows] == [True] * 3
    for row in rows:
        assert 0 < row["seconds_prefill"] + row["seconds_decode"] <= row["seconds_rollout"]
        if row["trained_tokens"]:
            parts = [row[f"seconds_{part}"] for part in ("reference", "forward", "backward", "optimiser")]
            assert min(parts) > 0
            assert sum(parts) <= row["seconds_update"]
    assert rows[-1] == last
    assert events == ["evaluation", "step", "step", "step", "evaluation"]
    assert (last["hek_E1"], last["hek_E2"], last["hek_E3"]) == (1, 1, 0)
    assert last["experience_hit_rate_start"] == 1.0
    assert last["reward_with_experience"] is not None
    assert last["reward_without_experience"] is not None
    assert last["engine_mismatch"] < 1e-4
    rollouts = read_rollouts(run / "rollouts" / "step_000003.jsonl.gz")
    shown = [bool(rollout.injections) for rollout in rollouts]
    assert shown == [index % 6 < 3 for index in range(18)]
    assert {rollout.snapshot_id for rollout in rollouts} == {trainer.snapshot.id}
    assert {rollout.policy_step for rollout in rollouts} == {2}
    assert len({rollout.seed for rollout in rollouts}) == 18
    evaluation = json.loads((run / "eval" / "step_000003.json").read_text())
    for arm in ("without_hek", "with_hek"):
        assert {"em", "f1", "cem", "reward", "n", "searches_per_answer"} <= set(evaluation[arm])
        assert evaluation[arm]["n"] == 4
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.resolved.yaml", "eval", "inputs.json", "metrics.jsonl", "rollouts", "snapshot",
        "tokenizer",
    ]  # fmt: skip
    saved = run / "checkpoints" / "step_000003" / "model"
    model, _ = load_policy(TrainConfig.from_dict({"model": {"path": str(saved), "device": "cpu"}}).model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def read_rollouts(path):
    from hiexp.io import read_jsonl

    return [Rollout.from_json(row) for _, row in read_jsonl(path)]


def test_the_snapshot_stays_pinned_while_the_hek_grows(tiny_run, tmp_path, hek_path):
    import shutil

    path = tmp_path / "hek.sqlite"
    shutil.copy(hek_path, path)
    config = tiny_run.config(tmp_path / "run", experience={"hek": str(path)}, run={"steps": 1})
    first = GRPOTrainer(TrainConfig.from_dict(config))
    first.train()
    with HEK.open(path, mode="w") as hek:
        hek.add([Experience(level="E2", title="grass ?", description="look behind is", qa_groups=("a", "b"))])
        grown = hek.snapshot()
    config["run"]["steps"] = 2
    again = GRPOTrainer(TrainConfig.from_dict(config))
    again.train()
    assert again.snapshot.id == first.snapshot.id != grown.id
    with pytest.raises(ValueError, match="is pinned to"):
        GRPOTrainer(TrainConfig.from_dict(config), snapshot=grown)
    # Edited, the pinned file is refused; gone, the grown HEK does not take its place unnoticed.
    pinned = next((tmp_path / "run" / "snapshot").iterdir())
    whole = pinned.read_bytes()
    pinned.write_bytes(whole[:-20] + bytes(20))
    with pytest.raises(DataError, match=pinned.name):
        GRPOTrainer(TrainConfig.from_dict(config))
    pinned.unlink()
    with pytest.raises(ValueError, match=r"trained with HEK snapshot .* is missing or another one: put it back"):
        GRPOTrainer(TrainConfig.from_dict(config)).train()
    pinned.write_bytes(whole)
    assert GRPOTrainer(TrainConfig.from_dict(config)).train()["step"] == 2


class RedTask:
    """Reward 1 for the answer 'red': something a policy without knowledge can learn in a few steps."""

    def training(self, step, count):
        return TaskBatch([Question(f"{step}/{i}", "colour of sky ?", ("red",)) for i in range(count)])

    def evaluation(self):
        return []

    def score(self, question, answer):
        return {"em": float(answer == "red")}


def test_it_learns(tiny_run, tmp_path):
    config = tiny_run.config(
        tmp_path / "run", algorithm={"lr": 3e-3, "kl_coef": 0.0}, run={"steps": 15, "checkpoint_every": 100},
        rollout={"group_size": 8},
    )  # fmt: skip
    GRPOTrainer(TrainConfig.from_dict(config), task=RedTask()).train()
    rewards = [row["reward_mean"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(rewards[:2]) < 0.5
    assert np.mean(rewards[-3:]) > 0.75


class BrokenTool:
    name = "broken"

    def search(self, queries, top_k):
        raise ConnectionError("no route to host")


def test_a_tool_that_fails_does_not_stop_training(tiny_run, tmp_path):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"steps": 1}))
    last = GRPOTrainer(config, tool=BrokenTool()).train()
    assert last["tool_errors"] > 0
    calls = [
        call for rollout in read_rollouts(tmp_path / "run/rollouts/step_000001.jsonl.gz") for call in rollout.tool_calls
    ]
    assert {call.status for call in calls} == {"error"}
    assert "no route to host" in calls[0].error


class NanTask(RedTask):
    def score(self, question, answer):
        return {"em": float("nan") if answer == "red" else float(answer == "blue")}


def test_nan_rewards_stop_the_run_or_stay_out_of_it(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path / "a", run={"steps": 2})
    with pytest.raises(ValueError, match=r"rollout 1/\d/0/\d: expected a finite reward, got nan"):
        GRPOTrainer(TrainConfig.from_dict(config), task=NanTask()).train()
    assert any(rollout.reward is None for rollout in read_rollouts(tmp_path / "a/rollouts/step_000001.jsonl.gz"))
    config = tiny_run.config(tmp_path / "b", run={"steps": 2}, algorithm={"nan_reward": "zero"})
    last = GRPOTrainer(TrainConfig.from_dict(config), task=NanTask()).train()
    assert last["nan_rewards"] > 0
    assert np.isfinite(last["grad_norm"])


LONG = Question("long", "colour of " + "sky " * 40, ("red",))


class LongTask(RedTask):
    def evaluation(self):
        return [TaskBatch([LONG])]


@pytest.mark.parametrize("place", ["training", "evaluation", "endless"])
def test_a_prompt_longer_than_the_context_is_named_before_anything_runs(tiny_run, tmp_path, place):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run", model={"context_length": 16}))
    short = [Question(f"q{i}", "colour of sky ?", ("red",)) for i in range(20)]
    lists = {"training": short, "evaluation": short, place: [*short[:3], LONG]}
    task = LongTask() if place == "endless" else QuestionTask(lists["training"], lists["evaluation"], Scorer(), 0)
    with pytest.raises(ValueError, match="question 'long': its prompt has 42 tokens"):
        GRPOTrainer(config, task=task)
    assert not (tmp_path / "run").exists()


class InfiniteTask(LongTask):
    def evaluation(self):
        return [TaskBatch([Question("q", "colour of sky ?", ("red",))])]

    def score(self, question, answer):
        return {"em": float("inf")}


def test_infinite_rewards_stop_an_evaluation(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path / "run", task={"malformed_reward": 0.0}, evaluation={"temperature": 0.0})
    trainer = GRPOTrainer(TrainConfig.from_dict(config), task=InfiniteTask())
    with pytest.raises(ValueError, match="expected a finite reward, got inf"):
        trainer.evaluate()


def test_a_question_twice_in_a_step_is_refused(tiny_run, tmp_path):
    class TwiceTask(RedTask):
        def training(self, step, count):
            return TaskBatch([Question("twin", "colour of sky ?", ("red",))] * count)

    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run"))
    with pytest.raises(ValueError, match="question 'twin': expected different question ids in a step"):
        GRPOTrainer(config, task=TwiceTask()).train()


def test_more_questions_a_step_than_there_are_is_told_before_anything_is_written(tiny_run, tmp_path):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run", run={"questions_per_step": 9}))
    with pytest.raises(ValueError, match=r"run.questions_per_step: expected at most the 8 training questions, got 9"):
        GRPOTrainer(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"task": {"train": ""}}, r"task.train: expected a JSONL"),
        ({"task": {"train": "/nowhere.jsonl"}}, r"/nowhere.jsonl: no such file"),
        ({"task": {"kind": "miniworld"}}, r"task.kind: miniworld is built in memory"),
        ({"tool": {"corpus": ""}}, r"tool.corpus: expected a JSONL"),
        ({"experience": {"hek": "/nowhere.sqlite"}}, r"nowhere.sqlite"),
        ({"model": {"path": ""}}, r"model.path"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(tiny_run, tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run", **stages)))
    assert not (tmp_path / "run").exists()


def test_model_without_tokenizer(tiny_run, tmp_path):
    config = TrainConfig.from_dict(tiny_run.config(tmp_path / "run"))
    with pytest.raises(ValueError, match="model, tokenizer: expected both or neither"):
        GRPOTrainer(config, tokenizer=object())


def test_presets_are_those_of_group_advantage():
    from typing import get_args

    from hiexp.ops.group_advantage import PRESETS
    from hiexp.rl.config import AdvantagePreset

    assert set(get_args(AdvantagePreset)) == set(PRESETS)
