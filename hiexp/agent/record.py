"""The rollout record: exact tokens, the mask, and everything the rollout saw (design: tokens in, tokens out)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SpanKind = Literal["prompt", "experience", "sampled", "tool", "template"]
FinishReason = Literal[
    "answer", "max_turns", "max_tokens", "context", "malformed", "eos", "max_searches", "max_tool_seconds", "cancelled"
]
# ``duplicate``: the rollout had asked the same before and was answered from its own earlier result.
ToolStatus = Literal["ok", "empty", "timeout", "error", "duplicate"]


@dataclass(slots=True)
class Span:
    """Tokens ``[start, end)`` of a rollout that came from one place; spans tile the rollout without gaps."""

    kind: SpanKind
    start: int
    end: int


@dataclass(slots=True)
class Injection:
    """One experience the rollout was shown, and where (token span, half-open).

    ``turn`` is 0 in the prompt and ``t`` in the tool response to the ``t``-th sampled turn, counted from 1.
    ``propensity``: the probability with which it was shown once it was retrieved; below 1 with experience dropout.
    """

    exp_id: str
    rev: int
    level: str
    score: float
    turn: int
    start: int
    end: int
    propensity: float = 1.0


@dataclass(slots=True)
class ToolCall:
    """One tool call; failures are recorded here and the rollout goes on. ``turn``: the sampled turn, counted from 1.

    ``document_ids`` are all that were found; the first ``shown`` of those with content were inserted, the rest left no
    room (a single one may have been cut). None in records of versions that did not count them.
    """

    turn: int
    query: str
    status: ToolStatus
    seconds: float
    document_ids: list[str] = field(default_factory=list)
    error: str | None = None
    shown: int | None = None


@dataclass(slots=True)
class Rollout:
    """One attempt of the agent at one question.

    Attributes:
        rollout_id: unique within a run: ``{question_id}/{policy_step}/{index in group}``.
        question_id: id of the question; rollouts of one question and step form a group.
        token_ids: every token, prompt included, exactly as sampled or inserted; length L.
        loss_mask: length L, 1 exactly on sampled tokens.
        logprobs: length L, the engine's log-probability at temperature of sampled tokens, 0.0 elsewhere;
            NaN where the engine has none (a chat API).
        spans: tile [0, L).
        injections: experiences shown. Empty for control rollouts.
        dropped: experiences that were retrieved and then left out by experience dropout; their spans are empty.
        tool_calls: in order.
        snapshot_id: HEK snapshot it was pinned to, None without one.
        seed: the sampling seed of this rollout.
        policy_step: training step of the policy that acted.
        dialect: name of the turn grammar.
        finish_reason: why it ended.
        answer: extracted final answer or None.
        reward: outcome reward, None until scored.
        scores: em, f1, cem, ... once scored.
        engine_restarts: how often the engine died while this rollout was in flight; it went on from its tokens.
        steps: readable steps as ``[kind, text]`` for reports and reflection; never used for training.
    """

    rollout_id: str
    question_id: str
    question: str
    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    spans: list[Span]
    injections: list[Injection]
    tool_calls: list[ToolCall]
    snapshot_id: str | None
    seed: int
    policy_step: int
    dialect: str
    finish_reason: FinishReason
    answer: str | None
    reward: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)
    engine_restarts: int = 0
    dropped: list[Injection] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; :meth:`from_json` is its inverse. JSON has no NaN: it becomes null."""
        return asdict(self) | {"logprobs": [None if value != value else value for value in self.logprobs]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Rollout:
        """Rebuild a rollout from :meth:`to_json`."""
        row = dict(row)
        row["spans"] = [Span(**span) for span in row["spans"]]
        row["injections"] = [Injection(**injection) for injection in row["injections"]]
        row["dropped"] = [Injection(**injection) for injection in row.get("dropped", [])]
        row["tool_calls"] = [ToolCall(**call) for call in row["tool_calls"]]
        row["logprobs"] = [float("nan") if value is None else value for value in row["logprobs"]]
        row["steps"] = [(kind, text) for kind, text in row["steps"]]
        return cls(**row)
