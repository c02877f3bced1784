"""Experience dropout: independent known coins, a record of what was left out, and the same rollout when made again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hiexp.agent.dropout import annealed, coin, kept
from hiexp.agent.record import Rollout
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.rl.config import TrainConfig
from hiexp.rl.metrics import rollout_metrics


def make_rollout(seed=0, name="q/0/0", tokens=3):
    return Rollout(
        name, "q", "?", [1] * tokens, [0] * tokens, [0.0] * tokens, [], [], [], None, seed, 0, "h", "answer", None
    )


def make_hits(n):
    return [SimpleNamespace(experience=SimpleNamespace(exp_id=f"e{i}", rev=2, level="E2"), score=0.5) for i in range(n)]


def test_coins_are_uniform_and_independent():
    values = np.array([[coin(make_rollout(seed), f"e{i}", 0) for i in range(4)] for seed in range(2000)])
    assert np.abs(values.mean(0) - 0.5).max() < 0.03
    assert abs((values < 0.2).mean() - 0.2) < 0.015
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.08
    first = make_rollout()
    assert coin(first, "e", 0) == coin(make_rollout(), "e", 0)
    others = [
        coin(make_rollout(1), "e", 0),
        coin(make_rollout(name="q/0/1"), "e", 0),
        coin(first, "f", 0),
        coin(first, "e", 1),
    ]
    assert coin(first, "e", 0) not in others


def test_dropped_entries_are_recorded_with_their_propensity():
    hits = make_hits(200)
    rollout = make_rollout()
    staying = kept(rollout, hits, 0.3, 2)
    assert 100 < len(staying) < 180
    # None moves up: order and membership are decided entry by entry.
    assert [hit.experience.exp_id for hit in staying] == [
        f"e{i}" for i in range(200) if coin(rollout, f"e{i}", 2) >= 0.3
    ]
    assert {hit.experience.exp_id for hit in hits} == {
        *(one.exp_id for one in rollout.dropped), *(hit.experience.exp_id for hit in staying)
    }  # fmt: skip
    one = rollout.dropped[0]
    assert (one.rev, one.level, one.turn, one.start, one.end, one.propensity) == (2, "E2", 2, 3, 3, 0.7)
    assert Rollout.from_json(rollout.to_json()) == rollout


def test_nothing_or_everything():
    assert len(kept(make_rollout(), make_hits(9), 0.0, 0)) == 9
    rollout = make_rollout()
    assert kept(rollout, make_hits(9), 1.0, 0) == []
    assert len(rollout.dropped) == 9


def test_records_of_before_can_be_read():
    row = make_rollout().to_json()
    del row["dropped"]
    assert Rollout.from_json(row).dropped == []


def test_annealing():
    assert [annealed(0.2, None, 0, step) for step in (1, 9)] == [0.2, 0.2]
    assert [annealed(0.2, 0.6, 4, step) for step in (1, 2, 5, 9)] == pytest.approx([0.2, 0.3, 0.6, 0.6])


@pytest.fixture
def trainer(tmp_path):
    """A trainer over an untrained tiny policy whose words cover the experience."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hiexp.agent.protocol import COMPACT_TAGS, COMPACT_WORDS
    from hiexp.rl.reward import QuestionTask
    from hiexp.rl.tiny_policy import make_tokenizer
    from hiexp.rl.trainer import GRPOTrainer
    from hiexp.tasks.question import Question
    from hiexp.tasks.scorers import Scorer

    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing:64") as hek:
        hek.add([
            Experience(level="E2", title=f"colour of {word}", description=f"look for {word}", qa_groups=("a", "b"))
            for word in ("sky", "sea", "rose", "milk")
        ])  # fmt: skip
        snapshot = hek.snapshot()
    words = [*COMPACT_TAGS, *COMPACT_WORDS, "colour", "of", "sky", "sea", "rose", "milk", "look", "for", "?"]
    tokenizer = make_tokenizer(list(dict.fromkeys(words)))
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    ).eval()  # fmt: skip
    config = TrainConfig.from_dict({
        "model": {"device": "cpu"}, "task": {"metric": "em"}, "tool": {"kind": "none"},
        "experience": {"dropout": 0.5, "experience_share": 0.5},
        "rollout": {"dialect": "hiexp_compact", "group_size": 4, "max_turns": 1, "max_new_tokens": 2,
                    "max_total_tokens": 100, "top_p": 1.0},
        "run": {"dir": str(tmp_path / "run"), "steps": 1, "questions_per_step": 2, "trackers": []},
    })  # fmt: skip
    questions = [Question(f"q{i}", f"colour of {word} ?", ("x",)) for i, word in enumerate(("sky", "sea"))]
    task = QuestionTask(questions, [], Scorer(), 0)
    return GRPOTrainer(config, model=model, tokenizer=tokenizer, task=task, snapshot=snapshot)


def test_training_rollouts_drop_and_record_evaluation_does_not(trainer):
    trainer._source.begin(0, trainer._sample, None)
    acted = trainer._act_round(1, 0, 2, set())
    informed = [rollout for rollout, allowed in zip(acted.rollouts, acted.with_experience, strict=True) if allowed]
    for rollout in informed:
        assert len(rollout.injections) + len(rollout.dropped) == 4
        assert {one.propensity for one in [*rollout.injections, *rollout.dropped]} == {0.5}
        for one in [*rollout.injections, *rollout.dropped]:
            assert (coin(rollout, one.exp_id, 0) >= 0.5) == (one in rollout.injections)
    assert len({tuple(one.exp_id for one in rollout.injections) for rollout in informed}) > 1
    assert all(not one.dropped for one in acted.rollouts if one not in informed)
    again = trainer._act_round(1, 0, 2, set())
    assert [one.token_ids for one in again.rollouts] == [one.token_ids for one in acted.rollouts]
    share = rollout_metrics(acted.rollouts, acted.with_experience)["experience_dropped"]
    assert share == sum(len(one.dropped) for one in informed) / 16
    evaluated = trainer._actor.answer(acted.questions[::4], None, trainer.snapshot, 0)
    assert all(len(rollout.injections) == 4 and not rollout.dropped for rollout in evaluated)
