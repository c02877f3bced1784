"""Row chunks behind ``linear_policy_loss``: three products in all (6THV), since a row's gradient is known at once.

In a chunk of R rows the logits (R, V) give each row's log-prob, hence its coefficient g = dloss / dlogprob, hence

    dlogits_v = g ([v = y] - p_v),   dhidden = dlogits @ weight,   dweight += dlogits.T @ hidden

before the next chunk reuses the memory. Rows with g = 0 (clipped, zero advantage) leave the last two products; rows
that are masked leave all three. g multiplies the rows of ``hidden`` and ``dhidden``, V / H times smaller than dlogits;
what remains, D = p - [v = y] up to a factor a row, is between -1 and 1 in every row and safe in half precision.

gspo needs the mean over a sequence before any coefficient: chunks then hold whole sequences, and a sequence longer
than a chunk costs one more product for its log-probs.
Symbols: T rows that count, H hidden size, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._logprob_tiles import Problem, product
from hiexp.ops._policy_batch import Settings, TokenBatch, sequence_sums
from hiexp.ops._policy_operator import Terms
from hiexp.ops._policy_rows import Rows
from hiexp.ops._policy_terms import merge

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.linear_policy_loss")

# Bytes of logits alive: with the copies made of single blocks this stays below 256 MB on a CPU. On a GPU a chunk has
# to be long, since every chunk reads and writes the whole weight gradient: 4096 rows, fewer where V is above 131072.
_BUDGET = {"cpu": 192 * 2**20, "cuda": 2**31}
_MOST_ROWS = 4096
# Columns converted at a time where the weight has another type than the products.
_BLOCK = 8192


@dataclass(frozen=True)
class Gradients:
    """Accumulators of the accumulator type; None where no gradient is asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None


@dataclass(frozen=True)
class Outcome:
    """``logprobs`` and ``entropy`` (T,), the latter maybe empty, ``statistics`` of token_terms, and the gradients."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    statistics: torch.Tensor
    gradients: Gradients


def chunk_rows(problem: Problem) -> int:
    """R, a multiple of 16 where it can be, for aligned pointers."""
    row_bytes: int = problem.weight.shape[0] * problem.accumulator.itemsize
    rows = min(_MOST_ROWS, _BUDGET[problem.hidden.device.type] // row_bytes)
    return max(1, rows - rows % 16 if rows >= 16 else rows)


def run(
    problem: Problem, batch: TokenBatch, lengths: torch.Tensor, settings: Settings, terms: Terms, rows: Rows,
    *, entropy: bool, needs: tuple[bool, bool, bool],
) -> Outcome:  # fmt: skip
    """``problem`` and ``batch`` hold only rows that count; ``lengths`` (S,) int64 says how many each sequence has."""
    chunk = _Chunks(problem, rows, entropy)
    total = problem.hidden.shape[0]
    logprobs = torch.zeros(total, dtype=problem.accumulator, device=problem.hidden.device)
    entropies = logprobs.clone() if entropy else logprobs.new_empty(0)
    grads = _empty(problem, needs)
    limit = chunk_rows(problem)
    whole = settings.kind == "gspo" and batch.old is not None
    spans = list(_whole_sequences(lengths.tolist(), limit) if whole else _slices(0, total, limit))
    if whole:
        batch = replace(batch, sequence_log_ratio=torch.zeros_like(batch.scale))
        for span in (span for span in spans if span.stop - span.start > limit):
            for part in _slices(span.start, span.stop, limit):
                logprobs[part] = chunk.logprobs(part)[1].logprobs
            _fill_sequence_ratio(batch, logprobs, span)
    statistics = []
    for span in spans:
        for part in _slices(span.start, span.stop, limit):
            logits, scored = chunk.logprobs(part)
            logprobs[part] = scored.logprobs
            if entropy:
                entropies[part] = scored.entropy
            if whole and span == part:
                _fill_sequence_ratio(batch, logprobs, span)
            coefficient, found = terms(logprobs[part], batch.of(part), settings)
            statistics.append(found)
            if grads.wanted:
                chunk.accumulate(part, logits, scored, coefficient, grads)
    return Outcome(logprobs, entropies, merge(statistics, logprobs.device), grads)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _whole_sequences(lengths: list[int], limit: int) -> Iterator[slice]:
    """Runs of whole sequences of at most ``limit`` rows, or one longer sequence."""
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > limit:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


def _fill_sequence_ratio(batch: TokenBatch, logprobs: torch.Tensor, span: slice) -> None:
    """Write the mean log ratio of every sequence of ``span`` to its tokens; ``span`` holds whole sequences."""
    assert batch.old is not None
    assert batch.sequence_log_ratio is not None
    _, sequence, count = torch.unique_consecutive(batch.sequence[span], return_inverse=True, return_counts=True)
    offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    mean = sequence_sums(logprobs[span] - batch.old[span], offsets) / count
    batch.sequence_log_ratio[span] = mean[sequence]


def _empty(problem: Problem, needs: tuple[bool, bool, bool]) -> Gradients:
    def zeros(like: torch.Tensor | None, need: bool) -> torch.Tensor | None:
        return torch.zeros_like(like, dtype=problem.accumulator) if need and like is not None else None

    return Gradients(*(zeros(x, n) for x, n in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True)))


class _Chunks:
    """The products of one call; all chunks share one buffer of logits where the products can write to it."""

    def __init__(self, problem: Problem, rows: Rows, entropy: bool) -> None:
        self._problem, self._rows, self._entropy = problem, rows, entropy
        self._bias = None if problem.bias is None else problem.bias.to(problem.accumulator)
        same = problem.weight.dtype == problem.operand
        step = problem.weight.shape[0] if same and problem.operand == problem.accumulator else _BLOCK
        self._columns = list(_slices(0, problem.weight.shape[0], step))
        shape = (min(chunk_rows(problem), problem.hidden.shape[0]), problem.weight.shape[0])
        half = problem.operand != problem.accumulator
        self._buffer = None if half else problem.hidden.new_empty(shape, dtype=problem.accumulator)

    def logprobs(self, part: slice) -> tuple[torch.Tensor, Any]:
        """What remains of the logits, and the scores of the rows ``part``."""
        problem = self._problem
        hidden = problem.hidden[part].to(problem.operand)
        if self._buffer is None:
            logits = product(hidden, problem.weight.t(), problem.accumulator)
        else:
            logits = self._buffer[: hidden.shape[0]]
            for columns in self._columns:
                torch.mm(hidden, problem.weight[columns].to(problem.operand).t(), out=logits[:, columns])
        inverse = None if problem.inverse_temperature is None else problem.inverse_temperature[part]
        return logits, self._rows.score(logits, self._bias, inverse, problem.targets[part], entropy=self._entropy)

    def accumulate(
        self, part: slice, logits: torch.Tensor, scored: Any, coefficient: torch.Tensor, grads: Gradients
    ) -> None:
        """Add the gradients of the rows ``part``; ``logits`` is used up."""
        problem = self._problem
        active = coefficient.nonzero().squeeze(1)
        if len(active) == 0:
            return
        picked = active + part.start
        if len(active) < len(coefficient):
            logits, scored = _compact(logits, active), scored.of(active)
        inverse = None if problem.inverse_temperature is None else problem.inverse_temperature[picked]
        factor = -coefficient[active] if inverse is None else -coefficient[active] * inverse
        difference, row_factor = self._rows.difference(
            logits, self._bias, inverse, problem.targets[picked], scored, problem.operand
        )
        factor = factor if row_factor is None else factor * row_factor
        self._add_hidden(grads, picked, difference, factor)
        self._add_weight(grads, picked, difference, factor)
        if grads.bias is not None:
            grads.bias.addmv_(difference.t().to(factor.dtype), factor)

    def _add_hidden(self, grads: Gradients, picked: Any, difference: torch.Tensor, factor: torch.Tensor) -> None:
        if grads.hidden is None:
            return
        problem, total = self._problem, None
        for columns in self._columns:
            part = product(difference[:, columns], problem.weight[columns].to(problem.operand), problem.accumulator)
            total = part if total is None else total.add_(part)
        assert total is not None
        grads.hidden.index_copy_(0, picked, total.mul_(factor[:, None]))

    def _add_weight(self, grads: Gradients, picked: Any, difference: torch.Tensor, factor: torch.Tensor) -> None:
        if grads.weight is None:
            return
        problem = self._problem
        rows = problem.hidden[picked].to(factor.dtype) * factor[:, None]
        if problem.operand == problem.accumulator:
            grads.weight.addmm_(difference.t(), rows)
            return
        # The largest factor is taken out, so that small ones do not vanish in float16.
        unit = factor.abs().amax()
        rows = (rows / unit).to(problem.operand)
        for columns in self._columns:
            grads.weight[columns].addcmul_(product(difference[:, columns].t(), rows, problem.accumulator), unit)


def _compact(logits: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """The rows ``active`` (ascending) moved to the front, in place, block by block: a copy would double the memory."""
    step = max(1, 2**24 // (logits.shape[1] * logits.element_size()))
    for block in _slices(0, len(active), step):
        # Row i comes from a row >= i, so no block overwrites what a later one reads.
        logits[block] = logits[active[block]]
    return logits[: len(active)]
