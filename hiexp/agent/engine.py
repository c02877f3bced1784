"""What an inference engine must offer: token ids in; token ids, log-probabilities and a finish reason out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` keeps the smallest set of tokens with that probability."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")


@dataclass(frozen=True, slots=True)
class Generation:
    """Tokens sampled for one row in one turn (stop tokens included) and their log-probabilities.

    ``finish_reason``: ``stop`` (a stop string came up), ``eos``, ``length`` (``max_new_tokens`` reached), ``context``.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "eos", "length", "context"]


class Session(Protocol):
    """A batch of conversations that keep their cache between turns. Rows are addressed by index."""

    def generate(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> list[Generation]:
        """Sample one turn for each of ``rows`` (limits per row); the sampled tokens become part of the row.

        A stop string that ends in ``{}`` stands for a group: it ends the turn when its brace is closed again.
        """
        ...

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens (tool responses, templates) to ``rows``."""
        ...


class Engine(Protocol):
    """A model that can act. ``tokenizer`` has Hugging Face's interface."""

    tokenizer: Any
    context_length: int

    def open(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Session:
        """Start one row per prompt; ``seeds`` make each row's samples independent of its batch."""
        ...


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int], context_length: int) -> None:
    """ValueError for numbers of prompts and seeds that differ, an empty prompt, or one longer than the context."""
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds: expected one per prompt ({len(prompts)}), got {len(seeds)}")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context_length:
            raise ValueError(f"prompts[{row}]: expected 1 to {context_length} tokens (context), got {len(prompt)}")


def extend_rows(
    tokens: Sequence[list[int]], rows: Sequence[int], token_ids: Sequence[Sequence[int]], context_length: int
) -> None:
    """Append inserted tokens to ``tokens`` of ``rows``; ValueError for a row that would outgrow the context."""
    for row, ids in zip(rows, token_ids, strict=True):
        length = len(tokens[row]) + len(ids)
        if length > context_length:
            raise ValueError(f"token_ids: row {row} would have {length} tokens, the context is {context_length}")
        tokens[row].extend(int(token) for token in ids)
