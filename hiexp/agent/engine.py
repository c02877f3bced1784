"""What an inference engine must offer: token ids in; token ids, log-probabilities and a finish reason out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


class EngineError(RuntimeError):
    """The engine died and its sessions with it; rollouts in flight may be started again from their tokens."""


class EngineMemoryError(EngineError):
    """It ran out of memory; with fewer rows in flight it may not."""


class Session(Protocol):
    """Conversations that keep their cache between turns. Rows are addressed by index; each speaks a turn at a time.

    A row is idle, or generating between its :meth:`start` and the :meth:`finished` that returns its turn. Every method
    may raise :class:`EngineError`; the session is of no use afterwards.
    """

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        """Queue one turn for each of the idle ``rows`` (limits per row); does not wait for them.

        A stop string that ends in ``{}`` stands for a group: it ends the turn when its brace is closed again.

        Raises:
            ValueError: a row twice, one that is generating or released, or lengths that differ.
        """
        ...

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        """Turns ``(row, generation)`` that ended since the last call; the sampled tokens are part of the row then.

        Works until at least one has ended; an empty list where none is under way or, with ``block=False``, where none
        ended within one round of work.
        """
        ...

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens (tool responses, templates) to the idle ``rows``."""
        ...

    def release(self, rows: Sequence[int]) -> None:
        """These rows speak no more, whatever they were doing: drop their queued and running turns and their cache."""
        ...


class Engine(Protocol):
    """A model that can act. ``tokenizer`` has Hugging Face's interface."""

    tokenizer: Any
    context_length: int

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> Session:
        """One row per prompt; ``seeds`` make each row's samples independent of its batch.

        ``drawn`` counts the tokens a row has sampled already, for rows that go on after an engine died: their samples
        continue the stream of their seed. None: 0 each.
        """
        ...


def generate(
    session: Session, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
) -> list[Generation]:
    """Start a turn of each of ``rows`` and wait for all of them (lock-step); nothing else may be under way."""
    session.start(rows, max_new_tokens, stop, sampling)
    done: dict[int, Generation] = {}
    while len(done) < len(rows):
        ended = session.finished()
        if not ended:
            raise EngineError(f"session: {len(rows) - len(done)} turns were started and never finished")
        done.update(ended)
    return [done[row] for row in rows]


def check_turn(rows: Sequence[int], max_new_tokens: Sequence[int], busy: Collection[int], count: int) -> None:
    """ValueError for a turn that cannot start: rows that repeat, are unknown or busy (generating or released)."""
    if len(set(rows)) != len(rows) or len(max_new_tokens) != len(rows):
        raise ValueError("rows: expected distinct rows and one max_new_tokens each")
    for row in rows:
        if not 0 <= row < count or row in busy:
            raise ValueError(f"rows: expected idle rows of 0 to {count - 1}, got {row}")


def check_prompts(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], context_length: int, drawn: Sequence[int] | None = None
) -> None:
    """ValueError for numbers of prompts and seeds that differ, an empty prompt, or one longer than the context."""
    for name, values in (("seeds", seeds), ("drawn", drawn)):
        if values is not None and len(prompts) != len(values):
            raise ValueError(f"{name}: expected one per prompt ({len(prompts)}), got {len(values)}")
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
