"""Batched multi-turn generation with any transformers causal language model; the cache is kept between turns.

The physical side (slots, holes, masks) is in decoding.py. A model may bring its own cache (``model.new_cache()``); it
must work like a transformers Cache, ``batch_select_indices`` included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.agent.decoding import Batch, Turn
from hiexp.agent.engine import Generation, Sampling, check_prompts, extend_rows
from hiexp.agent.sampling import sample, uniforms
from hiexp.agent.stopping import StopRule

torch = require("torch", "train", "hiexp.agent.engine_transformers")


class TransformersEngine:
    """An :class:`hiexp.agent.engine.Engine` over a transformers model in this process.

    Args:
        model: causal language model with a head; its weights may be changed between sessions (training).
        tokenizer: Hugging Face tokenizer.
        device: where to put the model; None leaves it where it is.
        context_length: limit of prompt plus response in tokens; None takes the model's own.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Any = None, context_length: int | None = None) -> None:
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: expected a causal language model with a head, got {type(model).__name__}")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.context_length = _context_length(model.config, context_length)
        self._last_logits_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.windowed = _is_windowed(model.config)
        self._rules: dict[tuple[str, ...], StopRule] = {}

    @property
    def device(self) -> Any:
        """Where the model's embedding lives."""
        return self.model.get_input_embeddings().weight.device

    def open(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> TransformersSession:
        """Start one row per prompt (token ids); row ``i`` samples with ``seeds[i]``.

        Raises:
            ValueError: different numbers of prompts and seeds, an empty prompt, or one longer than the context.
        """
        check_prompts(prompts, seeds, self.context_length)
        return TransformersSession(self, prompts, seeds)

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
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)


class TransformersSession:
    """Rows of one batch, see :class:`hiexp.agent.engine.Session`. ``tokens[i]``: row ``i`` so far, prompt included."""

    def __init__(self, engine: TransformersEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        self.engine = engine
        self.tokens = [list(prompt) for prompt in prompts]
        self._seeds = [int(seed) for seed in seeds]
        self._sampled = [0] * len(self.tokens)
        self._batch: Batch | None = None

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens to ``rows``; they reach the model with the next :meth:`generate`."""
        extend_rows(self.tokens, rows, token_ids, self.engine.context_length)

    def generate(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> list[Generation]:
        """Sample one turn for each of ``rows``; limits are per row, and the context ends a row with ``context``."""
        if len(set(rows)) != len(rows) or len(max_new_tokens) != len(rows):
            raise ValueError("rows: expected distinct rows and one max_new_tokens each")
        room = [self.engine.context_length - len(self.tokens[row]) for row in rows]
        turn = Turn(rows, room, max_new_tokens, self._stream)
        if turn.width:
            rule = self.engine.stop_rule(stop)
            with self.engine.inference():
                self._decode(turn, rule, sampling)
        return [self._finish(turn, index, row) for index, row in enumerate(rows)]

    def _decode(self, turn: Turn, rule: StopRule, sampling: Sampling) -> None:
        """The decoding loop: one forward pass per step for all rows of ``turn`` that still run."""
        batch = self._batch_of([turn.rows[i] for i in turn.order])
        logits = batch.feed(
            [self.tokens[row][done:] for row, done in zip(batch.rows, batch.lengths.tolist(), strict=True)]
        )
        for step in range(turn.width):
            draws = torch.from_numpy(turn.draws(step)).to(logits.device)
            tokens, logprobs = sample(logits, draws, sampling.temperature, sampling.top_p)
            turn.record(step, tokens.cpu().numpy(), logprobs.cpu().numpy(), rule)
            if not turn.running.any():
                return
            keep = turn.leaving()
            if keep is not None:
                index = torch.from_numpy(keep).to(tokens.device)
                batch.select(keep, index)
                tokens = tokens[index]
            logits = batch.step(tokens, torch.from_numpy(turn.running).to(tokens.device))

    def _batch_of(self, rows: list[int]) -> Batch:
        """The cached batch narrowed to exactly ``rows``; rebuilt from their tokens where one of them has left it.

        Sliding-window attention measures distance in slots, so that holes inside a row would shorten its window. A new
        batch has holes on the left alone, and rows that run make none: such models are rebuilt every turn.
        """
        batch = self._batch
        if batch is None or self.engine.windowed or not set(rows) <= set(batch.rows):
            batch = self._batch = Batch(self.engine, rows)
        elif batch.rows != rows:
            place = {row: index for index, row in enumerate(batch.rows)}
            keep = np.array([place[row] for row in rows])
            batch.select(keep, torch.from_numpy(keep).to(self.engine.device))
        return batch

    def _finish(self, turn: Turn, index: int, row: int) -> Generation:
        count = int(turn.counts[index])
        tokens, logprobs = turn.tokens[index, :count].tolist(), turn.logprobs[index, :count]
        if not np.isfinite(logprobs).all():
            raise ValueError(f"model: log-probabilities of row {row} are not finite; the weights may have diverged")
        self.tokens[row].extend(tokens)
        self._sampled[row] += count
        return Generation(tokens, logprobs.tolist(), turn.reasons[index])

    def _stream(self, row: int, start: int, count: int) -> NDArray[np.float64]:
        """Uniform numbers for tokens ``start`` to ``start + count`` of this turn of ``row``."""
        return uniforms(self._seeds[row], self._sampled[row] + start, count)


def _context_length(config: Any, wanted: int | None) -> int:
    own = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        if own is None:
            raise ValueError("context_length: expected a number, the model's config has no max_position_embeddings")
        return int(own)
    if not 0 < wanted <= (own or wanted):
        raise ValueError(f"context_length: expected 1 to {own} (the model's limit), got {wanted}")
    return wanted


def _is_windowed(config: Any) -> bool:
    """Whether a layer attends to a sliding window only."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return any(layer != "full_attention" for layer in layers)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """End-of-sequence ids of tokenizer and generation config (chat models often have several)."""
    declared = [tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    ids: set[int] = set()
    for value in declared:
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ids
