"""Tile loops behind ``token_logprobs``: the (T, V) logits exist only one tile at a time, forward and backward.

The vocabulary is cut into tiles (outer loop), the rows into chunks (inner loop). A tile's weights are converted once,
its slice of the weight gradient is written once, and a row carries four numbers from tile to tile:

    m = max z,   s = sum exp(z - m),   a = sum exp(z - m) (z - m),   z_y = the target's logit

    log p_y = z_y - m - log s,   log-sum-exp = m + log s,   entropy = log s - a / s

with z = (hidden @ weight.T + bias) / temperature. The backward pass computes each tile again, with the saved
log-sum-exp as the normaliser, unless the forward pass could keep it (``Kept``).
Symbols: T rows, H hidden size, V vocabulary, R rows of a chunk, W columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hiexp._extras import require

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.token_logprobs")

# exp(-1e4) is exactly 0 in float32 and float64, and 0 * -1e4 is 0 where 0 * -inf would be NaN (a bias may be -inf).
FLOOR = -1e4


@dataclass(frozen=True)
class Epilogue:
    """What follows a tile's product: ``forward`` updates the state, ``backward`` turns logits into their gradient.

    ``keeps``: ``forward`` leaves the logits as they are, and ``backward`` takes ``out=``, so tiles may be kept.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    keeps: bool = False


@dataclass(frozen=True)
class Problem:
    """Checked arguments: hidden (T, H), weight (V, H), targets (T,) int64, maybe bias (V,), 1 / temperature (T,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    inverse_temperature: torch.Tensor | None

    @property
    def accumulator(self) -> torch.dtype:
        """float32 for float32 and half-precision inputs, float64 as soon as one input is float64."""
        return torch.float64 if torch.float64 in (self.hidden.dtype, self.weight.dtype) else torch.float32

    @property
    def operand(self) -> torch.dtype:
        """The type the matrix products read: half precision on a GPU, where the units accumulate in float32."""
        same = self.hidden.dtype == self.weight.dtype
        half = self.hidden.dtype in (torch.bfloat16, torch.float16)
        return self.hidden.dtype if same and half and self.hidden.is_cuda else self.accumulator

    def select(self, rows: torch.Tensor) -> Problem:
        inverse = None if self.inverse_temperature is None else self.inverse_temperature[rows]
        return Problem(self.hidden[rows], self.weight, self.targets[rows], self.bias, inverse)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """(R, W). At most two float32 buffers of that size are alive: 16 MB on a CPU, 256 MB on a GPU."""
    return (4096, 8192) if device.type == "cuda" else (1024, 2048)


def product(
    left: torch.Tensor, right: torch.Tensor, accumulator: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``left @ right`` with a result of type ``accumulator``; half-precision operands occur on a GPU only."""
    if left.dtype != accumulator:
        return torch.mm(left, right, out_dtype=accumulator)
    return torch.mm(left, right, out=out)


class Kept:
    """Hands out the parts of a flat buffer, in the order of the loops, as long as tiles fit."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.used = 0

    def take(self, rows: int, columns: int) -> torch.Tensor | None:
        start, self.used = self.used, self.used + rows * columns
        if self.used > len(self.buffer):
            self.used = len(self.buffer)  # the rest stays unused: backward asks for the same tiles in the same order
            return None
        return self.buffer[start : self.used].view(rows, columns)


class _Scratch:
    """One tile's memory, used for tile after tile where the product can write into it."""

    def __init__(self, problem: Problem) -> None:
        size = 1
        for total, step in zip(
            (len(problem.hidden), len(problem.weight)), tile_shape(problem.hidden.device), strict=True
        ):
            size *= min(total, step)
        self.buffer = problem.hidden.new_empty(
            size if problem.operand == problem.accumulator else 0, dtype=problem.accumulator
        )

    def tile(self, rows: int, columns: int) -> torch.Tensor | None:
        return self.buffer[: rows * columns].view(rows, columns) if len(self.buffer) else None


def slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def tiles(problem: Problem) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """(columns, weight tile (W, H) of the operand type, bias tile (W,) of the accumulator type)."""
    for columns in slices(problem.weight.shape[0], tile_shape(problem.hidden.device)[1]):
        bias = None if problem.bias is None else problem.bias[columns].to(problem.accumulator)
        yield columns, problem.weight[columns].to(problem.operand), bias


def _of(rows: slice, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def forward(
    problem: Problem, epilogue: Epilogue, *, entropy: bool, kept: torch.Tensor | None = None
) -> tuple[Any, Any, Any]:
    """Log-probs (T,), entropy (T,) or an empty tensor, log-sum-exp (T,), all of the accumulator type.

    ``kept``: flat buffer of the accumulator type that takes as many tiles of logits as fit, for ``backward``.
    """
    hidden = problem.hidden.to(problem.operand)  # (T, H)
    # m, s, a, z_y. They start at multiples of 16 whatever T is, since Triton compiles anew for unaligned pointers.
    padded = -(-hidden.shape[0] // 16) * 16
    state = hidden.new_zeros((4, padded), dtype=problem.accumulator)[:, : hidden.shape[0]]
    state[0] = torch.finfo(problem.accumulator).min  # finite, so that m - m never is inf - inf
    chunk = tile_shape(hidden.device)[0]
    keeper, scratch = Kept(state.new_empty(0) if kept is None else kept), _Scratch(problem)
    for columns, weight, bias in tiles(problem):
        for rows in slices(hidden.shape[0], chunk):
            shape = (rows.stop - rows.start, len(weight))
            place = keeper.take(*shape)
            place = scratch.tile(*shape) if place is None else place
            logits = product(hidden[rows], weight.t(), problem.accumulator, place)  # (R, W)
            target = problem.targets[rows] - columns.start
            epilogue.forward(
                logits, bias, _of(rows, problem.inverse_temperature), target, state[:, rows], entropy=entropy
            )
    m, s, a, z_y = state
    log_s = s.log()
    # z_y - m and log s are of the same size, m + log s may be much larger: subtract in this order. Rounding may still
    # leave a probability a little above 1, or an entropy a little below 0.
    logprobs = (z_y - m - log_s).clamp_(max=0.0)
    return logprobs, (log_s - a / s).clamp_(min=0.0) if entropy else state.new_empty(0), m + log_s


@dataclass(frozen=True)
class Upstream:
    """Gradient per row, (T,) each: dz_v = p_v (c - e (z_v - lse)) + g [v = y]."""

    target: torch.Tensor  # g: gradient of the log-prob
    constant: torch.Tensor  # c = d lse - g - e * entropy
    entropy: torch.Tensor | None  # e: gradient of the entropy

    def of(self, rows: torch.Tensor | slice) -> Upstream:
        return Upstream(self.target[rows], self.constant[rows], None if self.entropy is None else self.entropy[rows])

    def active(self) -> torch.Tensor:
        """Indices of the rows with a gradient. Masked rows, clipped tokens and zero advantages have none."""
        active = (self.target != 0) | (self.constant != 0)
        if self.entropy is not None:
            active |= self.entropy != 0
        return active.nonzero().squeeze(1)


def backward(
    problem: Problem, epilogue: Epilogue, lse: torch.Tensor, upstream: Upstream, needs: tuple[bool, bool, bool],
    kept: torch.Tensor | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Gradients of hidden, weight, bias; an empty tensor for each that ``needs`` says no to.

    Only rows with a gradient take part in the products. ``kept``: what ``forward`` filled; it is only read.
    """
    rows, total = upstream.active(), len(lse)
    everything = len(rows) == total
    part = problem if everything else problem.select(rows)
    if not everything:
        lse, upstream = lse[rows], upstream.of(rows)
    grads = _empty_grads(part, needs, zero=len(rows) == 0)
    keeper = None if kept is None or len(kept) == 0 else Kept(kept)
    chunks = _chunks(rows, total, tile_shape(lse.device)[0], aligned=keeper is not None)
    _accumulate(part, epilogue, lse, upstream, grads, chunks, keeper)
    hidden_grad = grads[0]
    if hidden_grad is not None and not everything:
        hidden_grad = torch.zeros_like(problem.hidden, dtype=problem.accumulator).index_copy_(0, rows, hidden_grad)
    results = (hidden_grad, grads[1], grads[2])
    return tuple(lse.new_empty(0) if grad is None else grad for grad in results)


def _empty_grads(problem: Problem, needs: tuple[bool, bool, bool], *, zero: bool) -> tuple[Any, Any, Any]:
    hidden = torch.zeros_like(problem.hidden, dtype=problem.accumulator) if needs[0] else None
    make = torch.zeros_like if zero else torch.empty_like  # every slice is written, once
    weight = make(problem.weight) if needs[1] else None
    bias = make(problem.bias) if needs[2] and problem.bias is not None else None
    return hidden, weight, bias


@dataclass(frozen=True)
class _Chunk:
    place: slice  # its rows among the active ones
    size: int  # rows of the tiles that forward kept for it
    local: torch.Tensor | None  # which of these rows are active, None for all


def _chunks(active: torch.Tensor, total: int, step: int, *, aligned: bool) -> list[_Chunk]:
    """The active rows in chunks; ``aligned`` to the chunks of the forward pass over all rows, or packed."""
    if not aligned or len(active) == 0:
        return [_Chunk(place, place.stop - place.start, None) for place in slices(len(active), step)]
    chunks = []
    for rows in slices(total, step):
        bounds = torch.searchsorted(active, torch.tensor([rows.start, rows.stop], device=active.device)).tolist()
        size = rows.stop - rows.start
        local = None if bounds[1] - bounds[0] == size else active[slice(*bounds)] - rows.start
        chunks.append(_Chunk(slice(*bounds), size, local))
    return chunks


def _accumulate(
    problem: Problem, epilogue: Epilogue, lse: torch.Tensor, upstream: Upstream, grads: tuple[Any, Any, Any],
    chunks: list[_Chunk], keeper: Kept | None,
) -> None:  # fmt: skip
    """Gradients of all rows of ``problem`` into ``grads``: hidden (T, H) accumulator type, zero; weight, bias."""
    hidden_grad, weight_grad, bias_grad = grads
    hidden = problem.hidden.to(problem.operand)
    scratch = _Scratch(problem)
    for columns, weight, bias in tiles(problem) if chunks else ():
        weight_sum = None
        if weight_grad is not None:
            # Summed over the row chunks in the accumulator type, then written once in the parameter's own type.
            in_place = weight_grad.dtype == problem.accumulator
            weight_sum = weight_grad[columns] if in_place else torch.empty_like(weight, dtype=problem.accumulator)
        bias_sum = None if bias_grad is None else torch.zeros_like(bias)
        first = True
        for chunk in chunks:
            stored = None if keeper is None else keeper.take(chunk.size, len(weight))
            rows = chunk.place
            if rows.start == rows.stop:
                continue
            out = scratch.tile(rows.stop - rows.start, len(weight))
            inverse, target = _of(rows, problem.inverse_temperature), problem.targets[rows] - columns.start
            arguments = (bias, inverse, target, lse[rows], upstream.of(rows))
            if stored is None:
                logits = product(hidden[rows], weight.t(), problem.accumulator, out)  # (R, W), becomes its own gradient
                epilogue.backward(logits, *arguments)
            else:
                logits = out
                epilogue.backward(stored if chunk.local is None else stored[chunk.local], *arguments, out=out)
            if bias_sum is not None:
                bias_sum += logits.sum(0)
            logits = logits.to(problem.operand)
            if hidden_grad is not None:
                add_product(hidden_grad[rows], logits, weight)
            if weight_sum is not None:
                add_product(weight_sum, logits.t(), hidden[rows], first=first)
            first = False
        if weight_sum is not None and weight_sum.data_ptr() != weight_grad[columns].data_ptr():
            weight_grad[columns] = weight_sum
        if bias_sum is not None:
            bias_grad[columns] = bias_sum


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool = False) -> None:
    """``total += left @ right``; with ``first`` what ``total`` held does not count."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(product(left, right, total.dtype))
    else:
        total += product(left, right, total.dtype)
