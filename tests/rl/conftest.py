"""A run in miniature: four words to learn, a two-layer Llama that was shown the grammar, a corpus, all on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

COLOURS = ("red", "blue", "green", "white")
THINGS = ("sky", "grass", "blood", "snow", "sea", "leaf", "rose", "milk")


@dataclass(frozen=True)
class TinyRun:
    """Paths of the miniature, and configs over them."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    def config(self, run_dir: Path, **stages: dict[str, Any]) -> dict[str, Any]:
        """A config as nested dicts; ``stages`` override single settings."""
        base: dict[str, dict[str, Any]] = {
            "model": {"path": str(self.model), "device": "cpu"},
            "task": {"train": f"{self.root}/train.jsonl", "evaluation": f"{self.root}/train.jsonl", "metric": "em"},
            "tool": {
                "kind": "bm25", "corpus": str(self.root / "corpus.jsonl"), "cache_dir": str(self.root / "cache"),
                "top_k": 1, "timeout_s": 60.0,
            },
            "rollout": {
                "group_size": 6, "dialect": "hiexp_compact", "max_turns": 2, "max_new_tokens": 8,
                "max_total_tokens": 60, "top_p": 1.0,
            },
            "algorithm": {"lr": 1e-3, "tokens_per_microbatch": 256},
            "evaluation": {"questions": 4},
            "run": {
                "dir": str(run_dir), "steps": 3, "questions_per_step": 3, "seed": 1, "checkpoint_every": 2,
                "threads": 1, "trackers": [],
            },
        }  # fmt: skip
        for stage, values in stages.items():
            base.setdefault(stage, {}).update(values)
        return base


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return write_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def hek_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experience for the miniature: an E1 and an E2 entry."""
    from hiexp.experience.record import Experience
    from hiexp.experience.store import HEK

    path = tmp_path_factory.mktemp("hek") / "hek.sqlite"
    with HEK.create(path, encoder="hashing:64") as hek:
        hek.add([
            Experience(level="E1", title="colour of sky ?", description="look for is , not of", qa_groups=("other",)),
            Experience(level="E2", title="colour of things", description="look for is", qa_groups=("other", "another")),
        ])  # fmt: skip
    return path


def write_run(root: Path, hidden_size: int = 32) -> TinyRun:
    """The miniature's files in ``root``."""
    colour = dict(zip(THINGS, COLOURS * 2, strict=True))
    questions = [
        {"id": thing, "question": f"colour of {thing} ?", "golden_answers": [colour[thing]]} for thing in THINGS
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    passages = [{"id": f"d{thing}", "title": thing, "text": f"{thing} is {colour[thing]}"} for thing in THINGS]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    model, tokenizer = make_policy(hidden_size)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return TinyRun(root)


def make_policy(hidden_size: int = 32) -> tuple[Any, Any]:
    """A Llama that answers at random, searches first half of the time, and keeps to the grammar as a rule."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hiexp.agent.protocol import COMPACT_TAGS, COMPACT_WORDS
    from hiexp.rl.tiny_policy import make_tokenizer

    tokenizer = make_tokenizer([*COMPACT_TAGS, *COMPACT_WORDS, *COLOURS, *THINGS, "colour", "of", "?", "is"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    texts = []
    for thing in THINGS:
        for answer in COLOURS:
            question = f"colour of {thing} ?"
            box = f"\\boxed{{ {answer} }}"
            call = f"<tool_call> {thing} </tool_call> <tool_response> {thing} is {answer} </tool_response>"
            texts += [f"{question} {box}", f"{question} {call} {box}"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def make_ragged_rollouts(n: int = 7, seed: int = 0) -> list[Any]:
    """Rollouts over random tokens, some of them masked, with engine log-probs near a uniform policy's."""
    import numpy as np

    from hiexp.agent.record import Rollout

    rng = np.random.default_rng(seed)
    rollouts = []
    for i in range(n):
        length = int(rng.integers(4, 20))
        mask = [0, 0, 1, *(rng.random(length - 3) < 0.6).astype(int).tolist()]
        logprobs = (mask * rng.normal(-3.3, 0.3, length)).tolist()
        tokens = rng.integers(4, 30, length).tolist()
        rollouts.append(
            Rollout(f"q{i}/0/0", f"q{i}", "?", tokens, mask, logprobs, [], [], [], None, i, 0, "hiexp", "answer", "x")
        )
    return rollouts


@pytest.fixture
def updated(tiny_run: TinyRun) -> Any:
    """``updated(rollouts, advantages, **algorithm) -> (PolicyUpdate, weights before, weights after, metrics)``.

    Plain gradient descent with lr 0.01 and no clipping of the gradient, so (before - after) / 0.01 is the gradient.
    """
    import copy

    from accelerate import Accelerator

    from hiexp.rl.config import AlgorithmConfig, TrainConfig
    from hiexp.rl.model import load_policy
    from hiexp.rl.scorer import PolicyScorer
    from hiexp.rl.update import PolicyUpdate

    def flat(model: Any) -> Any:
        return torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])

    def run(rollouts: Any, advantages: Any, *, prepare: Any = None, run: Any = None, **algorithm: Any) -> Any:
        faults, reward = algorithm.pop("faults", None), algorithm.pop("kl_in_reward", False)
        model, _ = load_policy(TrainConfig.from_dict(tiny_run.config(Path("unused"))).model)
        reference = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for i, weight in enumerate(reference.parameters()):
                weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        config = AlgorithmConfig(**{"lr": 1e-2, "kl_coef": 0.1, "max_grad_norm": 1e9, **algorithm})
        update = PolicyUpdate(
            PolicyScorer(model, 0.9), PolicyScorer(reference, 0.9) if config.kl_coef else None,
            torch.optim.SGD(model.parameters(), lr=1e-2), Accelerator(cpu=True), config,
            pad_id=0, constant_length=20, seed=0, faults=faults, kl_in_reward=reward,
        )  # fmt: skip
        if prepare is not None:
            prepare(update)
        before = flat(model)
        metrics = update.run(rollouts, advantages, list(range(len(rollouts))), 1, **(run or {}))
        return update, before, flat(model), metrics

    return run


@pytest.fixture
def ragged() -> Any:
    """:func:`make_ragged_rollouts`."""
    return make_ragged_rollouts
