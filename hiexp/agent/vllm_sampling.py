"""hiexp's own sampling inside vLLM: the numbers of a row's seed, and log-probabilities at the temperature before top_p.

vLLM gives log-probabilities either of the raw logits or after temperature and top_p; a trainer needs those between
(:func:`hiexp.agent.sampling.sample`). So a logits processor, which vLLM calls after the temperature, takes the token
itself and leaves vLLM nothing else to choose. With equal weights and seeds a turn is then the one the transformers
engine samples. Engine and model must share the process: what was drawn is handed over in memory.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.agent.sampling import sample, uniforms

torch = require("torch", "train", "hiexp.agent.vllm_sampling")
vllm_processors: Any = require("vllm.v1.sample.logits_processor", "vllm", "hiexp.agent.vllm_sampling")

_DRAWS = 64  # uniform numbers made ahead
_KEY = "hiexp_draws"
_open: dict[int, Draws] = {}
_numbers = itertools.count()


class Draws:
    """What one turn of one row samples with, and what came out.

    Args:
        seed: the row's.
        drawn: tokens the row has sampled before this turn.
        top_p: nucleus.

    ``logprobs[i]``: log-probability of the turn's token ``i``.
    """

    def __init__(self, seed: int, drawn: int, top_p: float) -> None:
        self.seed, self.drawn, self.top_p = seed, drawn, top_p
        self.logprobs: dict[int, float] = {}
        self.key = next(_numbers)
        self._start = -1
        self._ahead: NDArray[np.float64] = np.empty(0)
        _open[self.key] = self

    def extra_args(self) -> dict[str, int]:
        """What vLLM's sampling parameters must carry for this turn."""
        return {_KEY: self.key}

    def number(self, token: int) -> float:
        """The uniform number of the turn's token ``token``."""
        start = token - token % _DRAWS
        if start != self._start:
            self._start, self._ahead = start, uniforms(self.seed, self.drawn + start, _DRAWS)
        return float(self._ahead[token - start])

    def close(self) -> None:
        """The turn is over."""
        _open.pop(self.key, None)


class DrawProcessor(vllm_processors.LogitsProcessor):
    """The logits processor. Its rows follow vLLM's batch; a row without draws (a greedy one) is left alone."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[Draws, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """True: vLLM then calls it after the temperature, for rows that sample."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that left, came (with the list of their sampled tokens) or moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, sampled in batch_update.added:
            draws = _open.get((params.extra_args or {}).get(_KEY, -1))
            self._rows.pop(index, None)
            if draws is not None:
                self._rows[index] = (draws, sampled)
        swap = vllm_processors.MoveDirectionality.SWAP
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if direction == swap and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: Any) -> Any:
        """Take each row's token from ``logits`` (B, V) at the temperature; all others become impossible."""
        for top_p in {draws.top_p for draws, _ in self._rows.values()}:
            rows = [(i, draws, len(sampled)) for i, (draws, sampled) in self._rows.items() if draws.top_p == top_p]
            index = torch.tensor([i for i, _, _ in rows], device=logits.device)  # (b,)
            numbers = torch.tensor(
                [draws.number(token) for _, draws, token in rows], dtype=torch.float64, device=logits.device
            )
            tokens, logprobs = sample(logits[index], numbers, 1.0, top_p)
            logits[index] = float("-inf")
            logits[index, tokens] = 0.0
            for (_, draws, token), logprob in zip(rows, logprobs.tolist(), strict=True):
                draws.logprobs[token] = logprob
        return logits
