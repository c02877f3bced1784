"""A synthetic run directory, written file by file as the trainer writes it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from hiexp.agent.record import Injection, Rollout, Span, ToolCall
from hiexp.io import write_jsonl

_TEXT = "<pad> <bos> question who directed mirror harbor lesson look for screen not stage think search again documents "
WORDS = f"{_TEXT} doc1 says ada lang answer boxed </tool> <b>&injected;</b>".split()


_VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, text and table cells; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.table = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = attributes.get("id") or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.tables[self.table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[self.table][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """``read_page(path)``: tags, text and table cells of an HTML file."""
    return Page


class MakeRun(Protocol):
    def __call__(self, name: str, **options: Any) -> Path: ...


def scores(em: float, n: int = 200) -> dict[str, float]:
    return {
        "em": em,
        "f1": min(1.0, em + 0.02),
        "cem": min(1.0, em + 0.04),
        "reward": em,
        "n": n,
        "searches_per_answer": 1.5,
    }


def metric_rows(steps: int, first: float, last: float, hek: bool, controls: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(steps)
    rows = []
    for step in range(1, steps + 1):
        share = step / steps
        reward = first + (last - first) * share + float(rng.normal(0, 0.02))
        rows.append(
            {
                "step": step, "reward_mean": reward, "reward_std": 0.3, "advantage_var_raw": 0.2 * (1 - share / 2),
                "zero_variance_share": 0.1 + 0.4 * share, "grad_norm": 1.5 - share, "loss": 0.01,
                "kl_ref": 0.01 * share, "approx_kl": 1e-4, "clip_fraction": 0.02, "entropy": None,
                "engine_mismatch": 0.002, "engine_mismatch_max": 0.05, "uplift": 0.1 if hek and controls else None,
                "searches_per_answer": 1.5, "response_tokens": 15.0, "prompt_tokens": 60.0,
                "experience_hit_rate_E1": 0.6 if hek else None,
                "experience_hit_rate_start": 0.9 if hek else None, "reward_with_experience": reward if hek else None,
                "reward_without_experience": reward if controls or not hek else None, "finish_answer": 0.95,
                "finish_malformed": 0.05, "finish_max_turns": 0.0, "finish_max_tokens": 0.0, "finish_context": 0.0,
                "tool_errors": 0, "snapshot_id": "ab12" if hek else None, "hek_E1": 40 if hek else None,
                "hek_E2": 12 if hek else None, "hek_E3": 4 if hek else None, "seconds_rollout": 0.4,
                "seconds_score": 0.01, "seconds_update": 0.5, "seconds_step": 1.0, "lr": 3e-4,
            }
        )  # fmt: skip
    return rows


def make_rollout(index: int, reward: float, hek: bool) -> Rollout:
    """Prompt 0-4, experience 4-8 (where shown), sampled, tool response with an E1 inside, sampled."""
    kinds = [("prompt", 5)] + ([("experience", 5)] if hek else [])
    kinds += [("sampled", 3), ("tool", 4)] + ([("experience", 3)] if hek else []) + [("template", 1), ("sampled", 4)]
    spans, start = [], 0
    for kind, length in kinds:
        spans.append(Span(kind, start, start + length))
        start += length
    mask = [int(span.kind == "sampled") for span in spans for _ in range(span.end - span.start)]
    injected = [span for span in spans if span.kind == "experience"]
    levels = ("E2", "E1")
    return Rollout(
        rollout_id=f"q{index // 4}/30/{index % 4}", question_id=f"q{index // 4}",
        question="who directed mirror harbor <script>alert(1)</script>",
        token_ids=[(2 + i) % len(WORDS) for i in range(start)], loss_mask=mask, logprobs=[0.0] * start, spans=spans,
        injections=[
            Injection(f"{level}-7", 2, level, 0.91, turn, span.start, span.end)
            for turn, (level, span) in enumerate(zip(levels, injected, strict=False))
        ],
        tool_calls=[
            ToolCall(0, "mirror harbor <screen>", "ok", 0.002, ["d1", "d2"]),
            ToolCall(1, "again", "timeout", 1.0, [], "no reply in 1.0 s"),
        ],
        snapshot_id="ab12" if hek else None, seed=index, policy_step=30, dialect="hiexp", finish_reason="answer",
        answer="ada \u202elang", reward=reward, scores={"em": reward},
        steps=[("think", "the screen"), ("query", "mirror harbor"), ("documents", "doc <b>1</b>"), ("answer", "ada")],
    )  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, steps=, hek=, controls=, first=, last=, evaluations=, rollouts=, tokenizer=)`` -> directory."""
    return run_writer(tmp_path)


@pytest.fixture(scope="module")
def make_shared_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """``make_run`` for the runs that all tests of a file only read."""
    return run_writer(tmp_path_factory.mktemp("runs"))


def run_writer(folder: Path) -> MakeRun:
    def make(
        name: str, *, steps: int = 40, hek: bool = False, controls: bool = False, first: float = 0.5, last: float = 0.9,
        evaluations: dict[int, tuple[float, float | None]] | None = None, rollouts: bool = True, n: int = 200,
        tokenizer: bool = False,
    ) -> Path:  # fmt: skip
        path = folder / name
        (path / "eval").mkdir(parents=True)
        (path / "rollouts").mkdir()
        (path / "config.resolved.yaml").write_text(f"run: {{steps: {steps}, seed: 3}}\nalgorithm: {{lr: 0.0003}}\n")
        rows = metric_rows(steps, first, last, hek, controls)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step, (without, with_hek) in (evaluations or {}).items():
            result = {
                "step": step,
                "without_hek": scores(without, n),
                "with_hek": None if with_hek is None else scores(with_hek, n),
            }
            (path / "eval" / f"step_{step:06d}.json").write_text(json.dumps(result))
        if rollouts:
            records = [make_rollout(index, float(index % 2), hek and index % 4 < 3) for index in range(8)]
            write_jsonl(path / "rollouts" / f"step_{steps:06d}.jsonl.gz", [record.to_json() for record in records])
        if tokenizer:
            save_tokenizer(path / "tokenizer")
        return path

    return make


def save_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(folder)
