"""Triton row kernels that follow the two products of a tile in ``paired_logprobs``; twin of _logprob_pair_epilogue.py.

One pass reads both float32 tiles: maxima, sums, the KL's sum and both targets' logits. Symbols as in
hiexp/ops/_logprob_pair.py; structure and conventions as in logprob_epilogue.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FORWARD = {"BLOCK": 2048, "num_warps": 8}
BACKWARD = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _load_logits(
    row_ptr, bias_ptr, offsets, columns, scale, other, HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr
):
    z = tl.load(row_ptr + offsets, mask=offsets < columns, other=other)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offsets, mask=offsets < columns, other=0.0)
    if HAS_TEMPERATURE:
        z *= scale
    return z


@triton.jit
def _store_target(
    y_ptr, row_ptr, bias_ptr, target, columns, scale, HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr
):
    if (target >= 0) & (target < columns):
        z = tl.load(row_ptr + target)
        if HAS_BIAS:
            z += tl.load(bias_ptr + target)
        if HAS_TEMPERATURE:
            z *= scale
        tl.store(y_ptr, z)


@triton.jit(do_not_specialize=["columns"])
def forward_kernel(
    a_ptr,  # (R, W) float32 or float64, bare products of side a
    b_ptr,  # the same of side b
    bias_ptr,  # (W,)
    inverse_temperature_ptr,  # (R,)
    target_ptr,  # (R,) int64, relative to the tile
    state_ptr,  # (7, R): m_a, s_a, y_a, m_b, s_b, y_b, d; read and written
    columns,
    a_stride,
    b_stride,
    state_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
    base = state_ptr + row
    m_a = tl.load(base)
    s_a = tl.load(base + state_stride)
    m_b = tl.load(base + 3 * state_stride)
    s_b = tl.load(base + 4 * state_stride)
    d = tl.load(base + 6 * state_stride)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature_ptr + row)
    a_row = a_ptr + row * a_stride
    b_row = b_ptr + row * b_stride
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        # Columns past the edge are -inf on both sides: they raise no maximum and add exactly 0 to all sums.
        z_a = _load_logits(a_row, bias_ptr, offsets, columns, scale, float("-inf"), HAS_BIAS, HAS_TEMPERATURE)
        z_b = _load_logits(b_row, bias_ptr, offsets, columns, scale, float("-inf"), HAS_BIAS, HAS_TEMPERATURE)
        peak_a = tl.maximum(m_a, tl.max(z_a, axis=0))
        peak_b = tl.maximum(m_b, tl.max(z_b, axis=0))
        # The bounds as in the twin: the first tile's maxima are the lowest float, which must not overflow.
        shift_a = tl.maximum(m_a - peak_a, -1e4)
        shift_b = tl.maximum(m_b - peak_b, -1e30)
        decay_a = tl.exp(shift_a)
        z_a -= peak_a
        z_b -= peak_b
        e_a = tl.exp(z_a)
        # -inf - -inf is NaN where a token is forbidden; it has no weight.
        difference = tl.where(e_a == 0, 0.0, e_a * (z_a - z_b))
        d = decay_a * (d + s_a * (shift_a - shift_b)) + tl.sum(difference, axis=0)
        s_a = decay_a * s_a + tl.sum(e_a, axis=0)
        s_b = tl.exp(shift_b) * s_b + tl.sum(tl.exp(z_b), axis=0)
        m_a = peak_a
        m_b = peak_b
    tl.store(base, m_a)
    tl.store(base + state_stride, s_a)
    tl.store(base + 3 * state_stride, m_b)
    tl.store(base + 4 * state_stride, s_b)
    tl.store(base + 6 * state_stride, d)
    target = tl.load(target_ptr + row)
    _store_target(base + 2 * state_stride, a_row, bias_ptr, target, columns, scale, HAS_BIAS, HAS_TEMPERATURE)
    _store_target(base + 5 * state_stride, b_row, bias_ptr, target, columns, scale, HAS_BIAS, HAS_TEMPERATURE)


@triton.jit(do_not_specialize=["columns"])
def backward_kernel(
    a_ptr,  # (R, W), replaced by its gradient
    b_ptr,  # (R, W), the same
    bias_ptr,
    inverse_temperature_ptr,
    target_ptr,
    lse_a_ptr,
    lse_b_ptr,
    target_a_ptr,
    target_b_ptr,
    constant_a_ptr,
    constant_b_ptr,
    kl_ptr,  # (R,) each
    columns,
    a_stride,
    b_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature_ptr + row)
    a_row = a_ptr + row * a_stride
    b_row = b_ptr + row * b_stride
    log_a = _load_logits(a_row, bias_ptr, offsets, columns, scale, 0.0, HAS_BIAS, HAS_TEMPERATURE)
    log_b = _load_logits(b_row, bias_ptr, offsets, columns, scale, 0.0, HAS_BIAS, HAS_TEMPERATURE)
    log_a -= tl.load(lse_a_ptr + row)
    log_b -= tl.load(lse_b_ptr + row)
    p_a = tl.exp(log_a)
    k = tl.load(kl_ptr + row)
    difference = tl.where(p_a == 0, 0.0, log_a - log_b)
    grad_a = p_a * (tl.load(constant_a_ptr + row) + k * difference)
    grad_b = tl.exp(log_b) * tl.load(constant_b_ptr + row) - k * p_a
    hit = offsets == tl.load(target_ptr + row)
    grad_a += tl.where(hit, tl.load(target_a_ptr + row), 0.0)
    grad_b += tl.where(hit, tl.load(target_b_ptr + row), 0.0)
    if HAS_TEMPERATURE:
        grad_a *= scale
        grad_b *= scale
    tl.store(a_row + offsets, grad_a, mask=offsets < columns)
    tl.store(b_row + offsets, grad_b, mask=offsets < columns)


def forward_tile(z_a, z_b, bias, inverse_temperature, target, state):
    """See the twin. Tiles (R, W) and ``state`` (7, R) with unit stride along their last dimension."""
    rows, columns = z_a.shape
    if rows == 0:
        return  # an empty grid is an error
    with torch.cuda.device_of(z_a):
        forward_kernel[(rows,)](
            z_a, z_b, bias, inverse_temperature, target, state, columns, z_a.stride(0), z_b.stride(0), state.stride(0),
            HAS_BIAS=bias is not None, HAS_TEMPERATURE=inverse_temperature is not None, **FORWARD,
        )  # fmt: skip


def backward_tile(z_a, z_b, bias, inverse_temperature, target, upstream):
    """See the twin; ``upstream`` is a ``PairUpstream`` with unit strides."""
    rows, columns = z_a.shape
    if rows == 0:
        return
    with torch.cuda.device_of(z_a):
        backward_kernel[(rows, triton.cdiv(columns, BACKWARD["BLOCK"]))](
            z_a, z_b, bias, inverse_temperature, target, upstream.lse_a, upstream.lse_b, upstream.target_a,
            upstream.target_b, upstream.constant_a, upstream.constant_b, upstream.kl,
            columns, z_a.stride(0), z_b.stride(0),
            HAS_BIAS=bias is not None, HAS_TEMPERATURE=inverse_temperature is not None, **BACKWARD,
        )  # fmt: skip


def compile_targets():
    """(kernel, signature, constants, options) of every configuration, for scripts/compile_kernels.py."""
    for dtype in ("fp32", "fp64"):
        for extras in (False, True):
            flags = {"HAS_BIAS": extras, "HAS_TEMPERATURE": extras}
            tiles = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}" if extras else None}
            tiles |= {"inverse_temperature_ptr": f"*{dtype}" if extras else None, "target_ptr": "*i64"}
            sizes = {"columns": "i32", "a_stride": "i32", "b_stride": "i32"}
            yield forward_kernel, tiles | {"state_ptr": f"*{dtype}"} | sizes | {"state_stride": "i32"}, flags, FORWARD
            names = ("lse_a_ptr", "lse_b_ptr", "target_a_ptr", "target_b_ptr", "constant_a_ptr", "constant_b_ptr")
            yield backward_kernel, tiles | dict.fromkeys((*names, "kl_ptr"), f"*{dtype}") | sizes, flags, BACKWARD
