"""The forward passes of continuous batching: rows that join are prefilled together, rows that run make one step.

Blocks of different lengths would leave holes in the middle of rows. Instead the shorter ones feed some tokens again
whose keys and values were known, which costs what the hole would have cost and keeps every row contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require
from hiexp.agent.engine import Sampling
from hiexp.agent.kv_cache import RowCache, Stored
from hiexp.agent.sampling import sample, uniforms
from hiexp.agent.stopping import StopRule

if TYPE_CHECKING:
    from hiexp.agent.engine_transformers import TransformersEngine

torch = require("torch", "train", "hiexp.agent.decoding")

_PREFILL_TOKENS = 8192  # tokens of one forward pass; bounds activations to a few hundred MB at 1B parameters
# Rows are prefilled together while the tokens fed again for it are at most so many (a pass of its own costs about as
# much) and this share of what has to be fed.
_REFED_TOKENS, _REFED_SHARE = 32, 0.5
_DRAWS = 64  # uniform numbers made ahead per row

Reason = Literal["stop", "eos", "length", "context"]


class Row:
    """One conversation of a session: its tokens, its place in its random stream, what of it is cached outside."""

    def __init__(self, tokens: Sequence[int], seed: int, drawn: int) -> None:
        self.tokens, self.seed, self.drawn = list(tokens), seed, drawn
        self.stored: Stored | None = None
        self.cached = 0  # tokens that ``stored`` holds
        self.released = False
        self._ahead: NDArray[np.float64] = np.zeros(0)
        self._ahead_from = 0

    def forget(self) -> None:
        """Drop what is stored."""
        self.stored, self.cached = None, 0

    def draw(self) -> float:
        """The next uniform number of this row."""
        place = self.drawn - self._ahead_from
        if not 0 <= place < len(self._ahead):
            self._ahead, self._ahead_from, place = uniforms(self.seed, self.drawn, _DRAWS), self.drawn, 0
        self.drawn += 1
        return float(self._ahead[place])


class Turn:
    """One turn of one row while it is decoded."""

    def __init__(self, row: int, limit: int, full: Reason, rule: StopRule, sampling: Sampling) -> None:
        self.row, self.limit, self.full, self.rule, self.sampling = row, limit, full, rule, sampling
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.over = False

    def take(self, token: int, logprob: float) -> Reason | None:
        """Record a sampled token; why the turn ends here, or None."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        code = int(self.rule.codes[token])
        reason = self.rule.reason(code, self.tokens) if code else None
        return self.full if reason is None and len(self.tokens) >= self.limit else reason


def sample_turns(turns: Sequence[Turn], rows: Sequence[Row], logits: Any) -> tuple[list[int], list[float]]:
    """A token and its log-probability for each turn, given its logits (B, V) and its row."""
    draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64).to(logits.device)
    tokens = torch.zeros(len(turns), dtype=torch.long, device=logits.device)
    logprobs = torch.zeros(len(turns), dtype=torch.float32, device=logits.device)
    kinds = dict.fromkeys(turn.sampling for turn in turns)
    for kind in kinds:
        if len(kinds) == 1:
            tokens, logprobs = sample(logits, draws, kind.temperature, kind.top_p)
            break
        places = torch.tensor([i for i, turn in enumerate(turns) if turn.sampling == kind], device=logits.device)
        tokens[places], logprobs[places] = sample(logits[places], draws[places], kind.temperature, kind.top_p)
    return tokens.tolist(), logprobs.tolist()


def prefill_groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of ``rows`` to be prefilled together: those with about as many tokens to feed."""
    missing = [len(row.tokens) - row.cached for row in rows]
    groups: list[list[int]] = []
    needed = refed = 0
    for index in sorted(range(len(rows)), key=lambda i: -missing[i]):
        again = missing[groups[-1][0]] - missing[index] if groups else 0
        if groups and refed + again <= _REFED_TOKENS + _REFED_SHARE * (needed + missing[index]):
            groups[-1].append(index)
            needed, refed = needed + missing[index], refed + again
        else:
            groups.append([index])
            needed, refed = missing[index], 0
    return groups


def prefill(engine: TransformersEngine, rows: Sequence[Row], spare: int = 0) -> tuple[RowCache, Any]:
    """Feed what the cache of each row lacks (a token at least); a cache of these rows and their logits (B, V).

    Rows that are new and equal (the rollouts of a group) are computed once. ``spare``: further rows to allow for.
    """
    first: dict[tuple[int, ...], int] = {}
    source = [first.setdefault(tuple(row.tokens), i) if row.stored is None else i for i, row in enumerate(rows)]
    distinct = sorted(set(source))
    cache, logits = _prefill_distinct(engine, [rows[i] for i in distinct], len(rows) + spare)
    if len(distinct) == len(rows):
        return cache, logits
    whole = RowCache(engine.layout, len(rows) + spare, cache.capacity[1])
    whole.end = cache.end
    places = [distinct.index(i) for i in source]
    for place in places:
        whole.add(cache.view(place), cache.lengths[place])
    return whole, logits[torch.tensor(places, device=logits.device)]


def _prefill_distinct(engine: TransformersEngine, rows: Sequence[Row], capacity: int) -> tuple[RowCache, Any]:
    lengths = [len(row.tokens) for row in rows]
    width = max(length - row.cached for length, row in zip(lengths, rows, strict=True))
    kept = [max(length - width, 0) for length in lengths]
    cache = RowCache(engine.layout, max(capacity, len(rows)), 0)
    cache.reserve(len(rows), max(kept), width)
    cache.end = max(kept)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for place, (row, length) in enumerate(zip(rows, kept, strict=True)):
        cache.add(row.stored, length)
        ids[place, width - (lengths[place] - length) :] = row.tokens[length:]
    chunk = max(1, _PREFILL_TOKENS // len(rows))
    for start in range(0, width, chunk):
        behind = width - min(start + chunk, width)
        logits = forward(engine, cache, ids[:, start : start + chunk], [max(length - behind, 0) for length in lengths])
    return cache, logits


def forward(engine: TransformersEngine, cache: RowCache, ids: NDArray[np.int64], lengths: Sequence[int]) -> Any:
    """Feed the columns of ``ids`` (B, q) right-aligned; the rows have ``lengths`` tokens afterwards. Logits (B, V)."""
    device = engine.device
    width = ids.shape[1]
    slots = cache.used + width
    after = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
    mask = (torch.arange(slots, 0, -1, device=device) <= after).long()  # (B, S): a slot's distance from the end
    positions = (after - torch.arange(width, 0, -1, device=device)).clamp(min=0)  # (B, q)
    logits = engine.forward(torch.from_numpy(ids).to(device), mask, positions, cache)
    cache.advance(lengths, width)
    return logits
