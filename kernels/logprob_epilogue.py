"""Triton row kernels that follow each tile's product in ``token_logprobs``; twin of hiexp/ops/_logprob_epilogue.py.

The matrix products stay with cuBLAS, which hand-written Triton products do not reach at these shapes; what is left is
bound by memory, so each kernel reads the float32 tile once: bias, temperature, maximum, sums and target in one pass.

Symbols as in hiexp/ops/_logprob_tiles.py: R rows, W columns of a tile; per row m, s, a, z_y.
Nothing that changes from batch to batch is a constexpr, and the column count is not specialised: no recompilation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# One program handles a row in steps of BLOCK columns: 4096 float32 over 8 warps are four 16-byte loads a thread.
FORWARD = {"BLOCK": 4096, "num_warps": 8}
# The gradient is element-wise: one program a row and BLOCK columns.
BACKWARD = {"BLOCK": 2048, "num_warps": 8}


@triton.jit(do_not_specialize=["columns"])
def forward_kernel(
    logits_ptr,  # (R, W) float32 or float64, row stride given
    bias_ptr,  # (W,)
    inverse_temperature_ptr,  # (R,)
    target_ptr,  # (R,) int64, relative to the tile
    m_ptr,
    s_ptr,
    a_ptr,
    z_y_ptr,  # (R,) each, read and written
    columns,
    row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
    m = tl.load(m_ptr + row)
    s = tl.load(s_ptr + row)
    a = tl.load(a_ptr + row)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        # Columns past the edge are -inf: they raise no maximum and add exactly 0 to both sums.
        z = tl.load(row_ptr + offsets, mask=offsets < columns, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias_ptr + offsets, mask=offsets < columns, other=0.0)
        if HAS_TEMPERATURE:
            z *= scale
        peak = tl.maximum(m, tl.max(z, axis=0))
        # -1e4: exp is exactly 0 there, and 0 * -1e4 is 0 where 0 * -inf would be NaN.
        shift = tl.maximum(m - peak, -1e4)
        decay = tl.exp(shift)
        shifted = tl.where(z == float("-inf"), -1e4, z - peak)  # not maximum(): it would turn NaN into -1e4
        exponential = tl.exp(shifted)
        if ENTROPY:
            a = decay * (a + shift * s) + tl.sum(exponential * shifted, axis=0)
        s = decay * s + tl.sum(exponential, axis=0)
        m = peak
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s)
    if ENTROPY:
        tl.store(a_ptr + row, a)
    target = tl.load(target_ptr + row)
    if (target >= 0) & (target < columns):
        z_y = tl.load(row_ptr + target)
        if HAS_BIAS:
            z_y += tl.load(bias_ptr + target)
        if HAS_TEMPERATURE:
            z_y *= scale
        tl.store(z_y_ptr + row, z_y)


@triton.jit(do_not_specialize=["columns"])
def backward_kernel(
    logits_ptr,  # (R, W), replaced by its gradient
    bias_ptr,
    inverse_temperature_ptr,
    target_ptr,
    lse_ptr,
    upstream_target_ptr,
    upstream_constant_ptr,
    upstream_entropy_ptr,  # (R,) each
    columns,
    row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    ptrs = logits_ptr + row * row_stride + offsets
    z = tl.load(ptrs, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offsets, mask=inside, other=0.0)
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature_ptr + row)
        z *= scale
    z -= tl.load(lse_ptr + row)
    coefficient = tl.load(upstream_constant_ptr + row)
    if ENTROPY:
        logprob = tl.where(z == float("-inf"), -1e4, z)
        coefficient = coefficient - tl.load(upstream_entropy_ptr + row) * logprob
    gradient = coefficient * tl.exp(z)
    target = tl.load(target_ptr + row)
    gradient += tl.where(offsets == target, tl.load(upstream_target_ptr + row), 0.0)
    if HAS_TEMPERATURE:
        gradient *= scale
    tl.store(ptrs, gradient, mask=inside)


def forward_tile(logits, bias, inverse_temperature, target, state, *, entropy):
    """See the twin. ``logits`` (R, W) with unit column stride; ``state`` (4, R) with unit stride along R."""
    rows, columns = logits.shape
    if rows == 0:
        return  # an empty grid is an error
    with _device_of(logits):
        forward_kernel[(rows,)](
            logits, bias, inverse_temperature, target, *state, columns, logits.stride(0),
            HAS_BIAS=bias is not None, HAS_TEMPERATURE=inverse_temperature is not None, ENTROPY=entropy, **FORWARD,
        )  # fmt: skip


def backward_tile(logits, bias, inverse_temperature, target, lse, upstream):
    """See the twin; ``upstream`` is an ``Upstream`` with unit strides."""
    rows, columns = logits.shape
    if rows == 0:
        return
    with _device_of(logits):
        backward_kernel[(rows, triton.cdiv(columns, BACKWARD["BLOCK"]))](
            logits, bias, inverse_temperature, target, lse, upstream.target, upstream.constant, upstream.entropy,
            columns, logits.stride(0),
            HAS_BIAS=bias is not None, HAS_TEMPERATURE=inverse_temperature is not None,
            ENTROPY=upstream.entropy is not None, **BACKWARD,
        )  # fmt: skip


def _device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's. On a CPU (interpreter) it does nothing."""
    return torch.cuda.device_of(tensor)


def compile_targets():
    """(kernel, signature, constants, options) of every configuration, for scripts/compile_kernels.py."""
    for dtype in ("fp32", "fp64"):
        for with_bias, with_temperature, entropy in ((False, False, False), (True, True, True)):
            flags = {"HAS_BIAS": with_bias, "HAS_TEMPERATURE": with_temperature, "ENTROPY": entropy}
            tile = {"logits_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}" if with_bias else None}
            tile |= {"inverse_temperature_ptr": f"*{dtype}" if with_temperature else None, "target_ptr": "*i64"}
            sizes = {"columns": "i32", "row_stride": "i32"}
            state = dict.fromkeys(("m_ptr", "s_ptr", "a_ptr", "z_y_ptr"), f"*{dtype}")
            yield forward_kernel, tile | state | sizes, flags, FORWARD
            upstream = dict.fromkeys(("lse_ptr", "upstream_target_ptr", "upstream_constant_ptr"), f"*{dtype}")
            upstream["upstream_entropy_ptr"] = f"*{dtype}" if entropy else None
            yield backward_kernel, tile | upstream | sizes, flags, BACKWARD
