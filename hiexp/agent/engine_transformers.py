"""Batched multi-turn generation with any transformers causal language model; the cache is kept between turns.

The physical side (slots, holes, masks) is in decoding.py. A model may bring its own cache (``model.new_cache()``); it
must work like a transformers Cache, ``batch_select_indices`` included.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.agent.decoding import Row, Turn, forward, prefill, prefill_groups, sample_turns
from hiexp.agent.engine import EngineMemoryError, Generation, Sampling, check_prompts, check_turn, extend_rows
from hiexp.agent.kv_cache import Layout, RowCache
from hiexp.agent.stopping import StopRule
from hiexp.clock import Clock

torch = require("torch", "train", "hiexp.agent.engine_transformers")
cache_utils = require("transformers.cache_utils", "train", "hiexp.agent.engine_transformers")

# A prefill costs a forward pass of its own, however few rows join: they wait until they are this share of the running
# ones, but not for more rounds than this.
_JOIN_SHARE = 0.25
_LONGEST_WAIT = 8


class TransformersEngine:
    """An :class:`hiexp.agent.engine.Engine` over a transformers model in this process.

    Args:
        model: causal language model with a head; its weights may be changed between sessions (training).
        tokenizer: Hugging Face tokenizer.
        device: where to put the model; None leaves it where it is.
        context_length: limit of prompt plus response in tokens; None takes the model's own.

    ``clock``: seconds of ``prefill`` and ``decode``, sampling included; on CUDA too, because sampling waits for it.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Any = None, context_length: int | None = None) -> None:
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: expected a causal language model with a head, got {type(model).__name__}")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.context_length = _context_length(model.config, context_length)
        self.clock = Clock()
        self._last_logits_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._rules: dict[tuple[str, ...], StopRule] = {}
        self._layout: tuple[Any, Layout] | None = None

    @property
    def device(self) -> Any:
        """Where the model's embedding lives."""
        return self.model.get_input_embeddings().weight.device

    @property
    def layout(self) -> Layout:
        """What the model keeps per token, seen in a forward pass of one token (again where the model has moved)."""
        weight = self.model.get_input_embeddings().weight
        state = (weight.device, weight.dtype)
        if self._layout is None or self._layout[0] != state:
            cache = cache_utils.DynamicCache()
            one = torch.zeros((1, 1), dtype=torch.long, device=weight.device)
            with self.inference():
                self.forward(one, one + 1, one, cache)
            self._layout = (state, Layout(cache))
        return self._layout[1]

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> TransformersSession:
        """Start one row per prompt (token ids); row ``i`` samples with ``seeds[i]``, from draw ``drawn[i]`` on.

        Raises:
            ValueError: different numbers of prompts and seeds, an empty prompt, or one longer than the context.
        """
        check_prompts(prompts, seeds, self.context_length, drawn)
        return TransformersSession(self, prompts, seeds, [0] * len(prompts) if drawn is None else drawn)

    def stop_rule(self, stop: Sequence[str]) -> StopRule:
        """The compiled stop rule of these strings (kept, because it walks over the vocabulary)."""
        key = tuple(stop)
        if key not in self._rules:
            size = max(self.model.get_output_embeddings().weight.shape[0], len(self.tokenizer))
            self._rules[key] = StopRule(self.tokenizer, key, _eos_ids(self.model, self.tokenizer), size)
        return self._rules[key]

    def forward(self, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        """Logits (B, V) float32 of the last column of ``ids`` (B, q), given the cache and its mask (B, S + q)."""
        extra = {"logits_to_keep": 1} if self._last_logits_only else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        return output.logits[:, -1].float()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, no dropout; the model's training mode is restored afterwards."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()


class TransformersSession:
    """Rows of one batch, see :class:`hiexp.agent.engine.Session`. The schedule is a function of the calls alone."""

    def __init__(
        self, engine: TransformersEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int]
    ) -> None:
        self.engine = engine
        self._rows = [Row(prompt, int(seed), n) for prompt, seed, n in zip(prompts, seeds, drawn, strict=True)]
        self._busy: set[int] = set()  # rows that generate or are released
        self._queue: list[Turn] = []
        self._turns: list[Turn] = []  # by place in the batch; those that are over leave it in the next round
        self._batch: RowCache | None = None
        self._ended: list[tuple[int, Generation]] = []
        self._waited = 0

    @property
    def tokens(self) -> list[list[int]]:
        """Every row so far, prompt included."""
        return [row.tokens for row in self._rows]

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        """Queue one turn for each of ``rows``; limits are per row, and the context ends a row with ``context``."""
        check_turn(rows, max_new_tokens, self._busy, len(self._rows))
        rule = self.engine.stop_rule(stop)
        for row, wanted in zip(rows, max_new_tokens, strict=True):
            room = self.engine.context_length - len(self._rows[row].tokens)
            turn = Turn(row, min(room, wanted), "context" if room < wanted else "length", rule, sampling)
            if turn.limit > 0:
                self._busy.add(row)
                self._queue.append(turn)
            else:
                self._ended.append((row, Generation([], [], turn.full)))

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        """Turns that ended, after one round of work (``block=False``) or as many as it takes for one to end.

        Raises:
            EngineMemoryError: out of memory on the device. ValueError: log-probabilities that are not finite.
        """
        with self.engine.inference():
            while not self._ended and (self._queue or any(not turn.over for turn in self._turns)):
                self._round()
                if not block:
                    break
        ended, self._ended = self._ended, []
        return ended

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens to the idle ``rows``; they reach the model with their next turn."""
        extend_rows(self.tokens, rows, token_ids, self.engine.context_length)

    def release(self, rows: Sequence[int]) -> None:
        """Drop turns and cache of ``rows``; their place in the batch goes to others in the next round."""
        gone = set(rows)
        self._busy |= gone
        self._queue = [turn for turn in self._queue if turn.row not in gone]
        self._ended = [(row, said) for row, said in self._ended if row not in gone]
        for turn in self._turns:
            turn.over = turn.over or turn.row in gone
        for row in gone:
            self._rows[row].forget()
            self._rows[row].released = True
        if all(self._rows[turn.row].released for turn in self._turns):
            self._turns, self._batch = [], None

    def _round(self) -> None:
        """Rows that are over leave; then queued turns join, if it is time, or the running ones make a step."""
        try:
            self._settle()
            self._waited += 1
            due = len(self._queue) >= _JOIN_SHARE * len(self._turns) or self._waited >= _LONGEST_WAIT
            joins = bool(self._queue and due)
            with self.engine.clock.part("prefill" if joins else "decode"):
                (self._admit if joins else self._step)()
        except torch.OutOfMemoryError as error:
            raise EngineMemoryError(f"out of memory with {len(self._turns)} rows in the batch: {error}") from error

    def _settle(self) -> None:
        """Take the rows that are over out of the batch, with a copy of their cache unless they are released."""
        for place in reversed(range(len(self._turns))):
            turn = self._turns[place]
            if not turn.over or self._batch is None:
                continue
            row = self._rows[turn.row]
            if not row.released:
                row.stored, row.cached = self._batch.take(place), self._batch.lengths[place]
            self._batch.drop(place)
            last = self._turns.pop()
            if place < len(self._turns):
                self._turns[place] = last
        if not self._turns:
            self._batch = None

    def _admit(self) -> None:
        """Prefill the queued turns, sample their first tokens, and let those that go on join the batch."""
        queue, self._queue, self._waited = self._queue, [], 0
        for group in prefill_groups([self._rows[turn.row] for turn in queue]):
            turns = [queue[index] for index in group]
            rows = [self._rows[turn.row] for turn in turns]
            cache, logits = prefill(self.engine, rows)
            for row in rows:
                row.forget()
            self._sampled(turns, logits)
            if self._batch is None:
                self._batch = cache
            else:
                self._batch.reserve(len(self._turns) + len(turns), cache.used, 1)
                for place, length in enumerate(cache.lengths):
                    self._batch.add(cache.view(place), length)
            self._turns += turns

    def _step(self) -> None:
        """One token more for every row of the batch."""
        batch = self._batch
        assert batch is not None
        batch.reserve(len(self._turns), batch.used, 1)
        ids = np.array([[self._rows[turn.row].tokens[-1]] for turn in self._turns])
        self._sampled(self._turns, forward(self.engine, batch, ids, [length + 1 for length in batch.lengths]))

    def _sampled(self, turns: Sequence[Turn], logits: Any) -> None:
        """Sample a token of each turn and end those that end with it."""
        rows = [self._rows[turn.row] for turn in turns]
        for turn, row, token, logprob in zip(turns, rows, *sample_turns(turns, rows, logits), strict=True):
            if not math.isfinite(logprob):
                raise ValueError(
                    f"model: log-probabilities of row {turn.row} are not finite; the weights may have diverged"
                )
            row.tokens.append(token)
            reason = turn.take(token, logprob)
            if reason is not None:
                turn.over = True
                self._busy.discard(turn.row)
                self._ended.append((turn.row, Generation(turn.tokens, turn.logprobs, reason)))


def _context_length(config: Any, wanted: int | None) -> int:
    own = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        if own is None:
            raise ValueError("context_length: expected a number, the model's config has no max_position_embeddings")
        return int(own)
    if not 0 < wanted <= (own or wanted):
        raise ValueError(f"context_length: expected 1 to {own} (the model's limit), got {wanted}")
    return wanted


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """End-of-sequence ids of tokenizer and generation config (chat models often have several)."""
    declared = [tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    ids: set[int] = set()
    for value in declared:
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ids
