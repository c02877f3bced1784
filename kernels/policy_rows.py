"""Triton row kernels of ``linear_policy_loss``; twin of the torch functions in hiexp/ops/_policy_rows.py.

The scores of a row come from kernels/logprob_epilogue.py with the whole vocabulary as one tile. What is new here is the
gradient: logits become p - [v = y] in the type that the two gradient products read, in one pass (4 bytes read, 2
written an element), without a float32 copy in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hiexp.kernels import logprob_epilogue

from hiexp.ops._policy_rows import RowScores

# Element-wise: one program a row and BLOCK columns.
DIFFERENCE = {"BLOCK": 2048, "num_warps": 8}


@triton.jit(do_not_specialize=["columns"])
def difference_kernel(
    logits_ptr,  # (R, V), row stride given
    bias_ptr,  # (V,) or absent
    inverse_temperature_ptr,  # (R,) or absent
    target_ptr,  # (R,) int64
    lse_ptr,  # (R,)
    out_ptr,  # (R, V), row stride given; may be logits_ptr
    columns,
    row_stride,
    out_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    z = tl.load(logits_ptr + row * row_stride + offsets, mask=inside, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offsets, mask=inside, other=0.0)
    if inverse_temperature_ptr is not None:
        z *= tl.load(inverse_temperature_ptr + row)
    p = tl.exp(z - tl.load(lse_ptr + row))
    p -= tl.where(offsets == tl.load(target_ptr + row), 1.0, 0.0)
    tl.store(out_ptr + row * out_row_stride + offsets, p.to(out_ptr.dtype.element_ty), mask=inside)


def score(logits, bias, inverse_temperature, targets, *, entropy):
    """See ``score_torch``; ``logits`` (R, V) stay as they are."""
    # m, s, a, z_y. They start at multiples of 16 whatever R is, since Triton compiles anew for unaligned pointers.
    rows = logits.shape[0]
    state = logits.new_zeros((4, triton.cdiv(rows, 16) * 16))[:, :rows]
    state[0] = torch.finfo(logits.dtype).min
    logprob_epilogue.forward_tile(logits, bias, inverse_temperature, targets, state, entropy=entropy)
    m, s, a, z_y = state
    log_s = s.log()
    entropies = (log_s - a / s).clamp_(min=0.0) if entropy else logits.new_empty(0)
    return RowScores((z_y - m - log_s).clamp_(max=0.0), entropies, m + log_s)


def difference(logits, bias, inverse_temperature, targets, scores, dtype):
    """See ``difference_torch``; in place where ``dtype`` is that of ``logits``."""
    rows, columns = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    with torch.cuda.device_of(logits):
        difference_kernel[(rows, triton.cdiv(columns, DIFFERENCE["BLOCK"]))](
            logits, bias, inverse_temperature, targets, scores.normaliser, out, columns, logits.stride(0),
            out.stride(0), **DIFFERENCE,
        )  # fmt: skip
    return out, None


def compile_targets():
    """(kernel, signature, constants, options) of every configuration, for scripts/compile_kernels.py."""
    for out in ("fp32", "fp16", "bf16"):
        for extras in (False, True):
            optional = "*fp32" if extras else None
            signature = {"logits_ptr": "*fp32", "bias_ptr": optional, "inverse_temperature_ptr": optional}
            signature |= {"target_ptr": "*i64", "lse_ptr": "*fp32", "out_ptr": f"*{out}"}
            signature |= dict.fromkeys(("columns", "row_stride", "out_row_stride"), "i32")
            yield difference_kernel, signature, {}, DIFFERENCE
