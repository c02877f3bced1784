"""Every recipe in configs/ is a config this version reads; what the paper does not say is marked, memory computed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from hiexp.preflight.memory import ModelShape, estimate
from hiexp.rl.config import TrainConfig
from hiexp.rl.config_parse import read_yaml
from hiexp.tasks.qa import split_sources

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name != "quickstart.yaml")
QWEN = [name for name in RECIPES if name.startswith("qwen")]


@pytest.mark.parametrize("name", RECIPES)
def test_it_parses(name, monkeypatch):
    monkeypatch.delenv("HIEXP_DATA", raising=False)
    config = TrainConfig.from_yaml(CONFIGS / name)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.run.dir == f"runs/{name.removesuffix('.yaml')}"
    assert config.algorithm.tokens_per_microbatch >= config.rollout.max_total_tokens or config.rollout.server
    assert name in (CONFIGS / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_parses():
    from hiexp.quickstart.config import QuickstartConfig

    assert QuickstartConfig.from_yaml(CONFIGS / "quickstart.yaml").train.task.kind == "miniworld"


@pytest.mark.parametrize("name", QWEN)
def test_the_papers_values_stand_and_the_others_are_marked(name):
    config, text = TrainConfig.from_yaml(CONFIGS / name), (CONFIGS / name).read_text(encoding="utf-8")
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 0.95)
    assert config.algorithm.kl_coef == 1e-3 or "the paper's is 1e-3" in text
    assert (config.experience.start_top_k, config.experience.experience_share, config.algorithm.kind) == (
        5,
        1.0,
        "grpo",
    )
    given = read_yaml(CONFIGS / name, [])
    lines = text.splitlines()
    unknown = {
        "rollout": ("group_size",),
        "algorithm": ("lr", "clip_low", "warmup_steps"),
        "run": ("steps", "questions_per_step"),
    }
    for stage, keys in unknown.items():
        for key in keys:
            if key in given.get(stage, {}):
                (line,) = [line for line in lines if line.strip().startswith(f"{key}:")]
                assert "unknown in the paper: ours" in line


def test_the_papers_training_data():
    for name in ("qwen25_7b_eight_gpus.yaml", "qwen25_3b_one_gpu.yaml", "qwen25_7b_servers.yaml"):
        first, second = split_sources(TrainConfig.from_yaml(CONFIGS / name).task.train)
        assert first[0].endswith("train_hotpot_2wiki.jsonl")
        assert second == ("RUC-NLPIR/FlashRAG_datasets:musique/train.jsonl", 8000)
    assert TrainConfig.from_yaml(CONFIGS / "qwen25_7b_maths.yaml").task.train_limit == 45_000


# From the configurations of Qwen2.5-3B and 7B.
SHAPES = {
    "3b": ModelShape(3_085_938_688, 36, 2048, 2048, 256, 11_008, 151_936, 32_768),
    "7b": ModelShape(7_615_616_512, 28, 3584, 3584, 512, 18_944, 152_064, 32_768),
}


@pytest.mark.parametrize(
    ("name", "size", "shards", "gib"),
    [("qwen25_3b_one_gpu", "3b", 1, 68), ("qwen25_7b_eight_gpus", "7b", 8, 58), ("qwen25_7b_eight_gpus", "7b", 1, 129),
     ("qwen25_7b_maths", "7b", 8, 58)],
)  # fmt: skip
def test_the_memory_in_the_comments_is_the_estimate(name, size, shards, gib):
    path = CONFIGS / f"{name}.yaml"
    told = estimate(SHAPES[size], TrainConfig.from_yaml(path), device="cuda", shards=shards)
    assert round(told.peak / 2**30) == gib
    assert f"{gib} GiB" in path.read_text(encoding="utf-8")
