"""Persistent Triton kernel of the ``token_logprobs`` forward pass: product and row epilogue in one.

A unit of work is BLOCK_T rows times a split of SPLIT_TILES vocabulary tiles of BLOCK_V columns. As many programs as the
GPU has multiprocessors take units in a fixed order, GROUP row blocks together, so that programs that run at the same
time share weight tiles in L2. A unit keeps m, s, a of its rows in registers and writes them, with the target's logit,
once; a second kernel merges the splits of a row in the order of the vocabulary. No locks, no atomics.

A row's result depends on neither the other rows nor their number: splits are fixed by V, every product has the same
shape, and the sums have a fixed order. Nothing that changes from batch to batch is a constexpr.

Symbols as in hiexp/ops/_logprob_tiles.py: T rows, H hidden size, V vocabulary; S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Half precision through TMA on Hopper: 128 x 256 accumulators over 8 warps are 128 registers a thread, four stages of
# both operands take 192 KiB of shared memory. Where each thread computes its own addresses, 256 columns would spill.
HOPPER = {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 4}
POINTERS = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}
# float32 operands use the plain multiply-add units, which need both operands in registers.
FLOAT32 = {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 3}
INTERPRETED = {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 16, "num_warps": 4, "num_stages": 1}
SPLIT_COLUMNS = 2048  # 64 splits of a vocabulary of 131072; their state is 8 MB at T = 8192
GROUP = 16
MERGE = {"BLOCK_R": 128, "num_warps": 4}


@triton.jit
def _first_row_and_split(unit, row_blocks, splits, GROUP: tl.constexpr):
    """Units in column-major order within a group of row blocks."""
    per_group = GROUP * splits
    first = unit // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = unit % per_group
    return first + inside % size, inside // size


@triton.jit
def _merge(m, s, a, peak, ENTROPY: tl.constexpr):
    """s and a relative to ``peak`` >= m. -1e4: exp is exactly 0 there, and 0 * -1e4 is 0 where 0 * -inf is NaN."""
    shift = tl.maximum(m - peak, -1e4)
    decay = tl.exp(shift)
    if ENTROPY:
        a = decay * (a + shift * s)
    return decay * s, a


@triton.jit(do_not_specialize=["rows", "vocabulary", "row_blocks", "splits"])
def forward_kernel(
    hidden_ptr,  # (T, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    inverse_temperature_ptr,  # (T,)
    target_ptr,  # (T,) int64
    partial_ptr,  # (S, 4, T) float32: m, s, a, z_y of every split
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    partial_stride,  # T, padded
    row_blocks,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    if TMA:
        hidden_tiles = tl.make_tensor_descriptor(hidden_ptr, [rows, width], [hidden_stride, 1], [BLOCK_T, BLOCK_H])
        weight_tiles = tl.make_tensor_descriptor(
            weight_ptr, [vocabulary, width], [weight_stride, 1], [BLOCK_V, BLOCK_H]
        )
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _first_row_and_split(unit, row_blocks, splits, GROUP)
        t = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < rows
        target = tl.load(target_ptr + t, mask=live, other=-1)
        scale = tl.full((BLOCK_T,), 1.0, tl.float32)
        if HAS_TEMPERATURE:
            scale = tl.load(inverse_temperature_ptr + t, mask=live, other=1.0)
        m = tl.full((BLOCK_T,), -3.4e38, tl.float32)  # finite, so that m - m never is inf - inf
        s = tl.zeros((BLOCK_T,), tl.float32)
        a = tl.zeros((BLOCK_T,), tl.float32)
        z_y = tl.zeros((BLOCK_T,), tl.float32)
        for tile in range(SPLIT_TILES):
            first = (split * SPLIT_TILES + tile) * BLOCK_V
            v = first + tl.arange(0, BLOCK_V)
            z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for start in range(0, width, BLOCK_H):
                if TMA:
                    h = hidden_tiles.load([row_block * BLOCK_T, start])
                    w = weight_tiles.load([first, start])
                else:
                    k = start + tl.arange(0, BLOCK_H)
                    # 64 bits: rows * stride and vocabulary * stride pass 2^31
                    h_ptrs = hidden_ptr + t[:, None].to(tl.int64) * hidden_stride + k[None, :]
                    w_ptrs = weight_ptr + v[:, None].to(tl.int64) * weight_stride + k[None, :]
                    h = tl.load(h_ptrs, mask=live[:, None] & (k < width)[None, :], other=0.0)
                    w = tl.load(w_ptrs, mask=(v < vocabulary)[:, None] & (k < width)[None, :], other=0.0)
                z = tl.dot(h, w.T, z, input_precision=PRECISION)
            if HAS_BIAS:
                z += tl.load(bias_ptr + v, mask=v < vocabulary, other=0.0).to(tl.float32)[None, :]
            if HAS_TEMPERATURE:
                z *= scale[:, None]
            z_y += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), axis=1)
            # Columns past the edge are -inf: they raise no maximum and add exactly 0 to both sums.
            z = tl.where((v < vocabulary)[None, :], z, float("-inf"))
            peak = tl.maximum(m, tl.max(z, axis=1))
            s, a = _merge(m, s, a, peak, ENTROPY)
            z -= peak[:, None]
            exponential = tl.exp(z)
            s += tl.sum(exponential, axis=1)
            if ENTROPY:
                a += tl.sum(exponential * tl.where(z == float("-inf"), -1e4, z), axis=1)
            m = peak
        base = partial_ptr + split.to(tl.int64) * 4 * partial_stride + t
        tl.store(base, m, mask=live)
        tl.store(base + partial_stride, s, mask=live)
        if ENTROPY:
            tl.store(base + 2 * partial_stride, a, mask=live)
        tl.store(base + 3 * partial_stride, z_y, mask=live)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    partial_ptr,  # (S, 4, T)
    logprob_ptr,
    entropy_ptr,
    lse_ptr,  # (T,) each
    rows,
    splits,
    partial_stride,
    ENTROPY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = t < rows
    m = tl.full((BLOCK_R,), -3.4e38, tl.float32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    a = tl.zeros((BLOCK_R,), tl.float32)
    z_y = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(splits):
        base = partial_ptr + tl.cast(split, tl.int64) * 4 * partial_stride + t
        m_ = tl.load(base, mask=live, other=0.0)
        s_ = tl.load(base + partial_stride, mask=live, other=1.0)
        a_ = tl.zeros((BLOCK_R,), tl.float32)
        if ENTROPY:
            a_ = tl.load(base + 2 * partial_stride, mask=live, other=0.0)
        z_y += tl.load(base + 3 * partial_stride, mask=live, other=0.0)  # 0 in all splits but the target's
        peak = tl.maximum(m, m_)
        s, a = _merge(m, s, a, peak, ENTROPY)
        s_, a_ = _merge(m_, s_, a_, peak, ENTROPY)
        s += s_
        a += a_
        m = peak
    log_s = tl.log(s)
    logprob = z_y - m - log_s
    # Not minimum(): it would turn NaN into 0.
    tl.store(logprob_ptr + t, tl.where(logprob > 0, 0.0, logprob), mask=live)
    tl.store(lse_ptr + t, m + log_s, mask=live)
    if ENTROPY:
        entropy = log_s - a / s
        tl.store(entropy_ptr + t, tl.where(entropy < 0, 0.0, entropy), mask=live)


def configuration(dtype, capability, tma):
    """Tuned options for operands of ``dtype`` on a device of that capability (80, 90); None: the interpreter."""
    if capability is None:
        return INTERPRETED
    if dtype == torch.float32:
        return FLOAT32
    return HOPPER if tma else POINTERS


def can_use_tma(hidden, weight, capability):
    """TMA wants Hopper and rows that start at multiples of 16 bytes."""
    if capability is None or capability < 90 or hidden.dtype == torch.float32:
        return False
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (hidden, weight))
    return aligned and hasattr(tl, "make_tensor_descriptor")


def forward(hidden, weight, targets, bias, inverse_temperature, *, entropy):
    """Log-probs, entropy (or an empty tensor), log-sum-exp, (T,) float32 each.

    ``hidden`` (T, H), ``weight`` (V, H): one dtype, unit column stride; the others as in ``Problem``.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    logprobs, entropies, lse = (
        hidden.new_empty(length, dtype=torch.float32) for length in (rows, rows if entropy else 0, rows)
    )
    if rows == 0:
        return logprobs, entropies, lse
    capability = None
    if hidden.is_cuda:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        capability = 10 * major + minor
    tma = can_use_tma(hidden, weight, capability)
    options = configuration(hidden.dtype, capability, tma)
    row_blocks = triton.cdiv(rows, options["BLOCK_T"])
    split_tiles = max(1, SPLIT_COLUMNS // options["BLOCK_V"])
    splits = triton.cdiv(vocabulary, split_tiles * options["BLOCK_V"])
    stride = triton.cdiv(rows, 16) * 16
    partial = hidden.new_empty((splits, 4, stride), dtype=torch.float32)
    programs = row_blocks * splits
    with torch.cuda.device_of(hidden):
        if hidden.is_cuda:
            programs = min(programs, torch.cuda.get_device_properties(hidden.device).multi_processor_count)
        if tma:
            triton.set_allocator(lambda size, _alignment, _stream: hidden.new_empty(size, dtype=torch.int8))
        forward_kernel[(programs,)](
            hidden, weight, bias, inverse_temperature, targets, partial, rows, vocabulary, width,
            hidden.stride(0), weight.stride(0), stride, row_blocks, splits,
            HAS_BIAS=bias is not None, HAS_TEMPERATURE=inverse_temperature is not None, ENTROPY=entropy, TMA=tma,
            PRECISION="ieee", SPLIT_TILES=split_tiles, GROUP=GROUP, **options,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(rows, MERGE["BLOCK_R"]),)](
            partial, logprobs, entropies, lse, rows, splits, stride, ENTROPY=entropy, **MERGE
        )
    return logprobs, entropies, lse


def compile_targets():
    """(kernel, signature, constants, options) of every configuration, for scripts/compile_kernels.py."""
    for dtype, options, capabilities, tma in (
        ("bf16", HOPPER, (90,), True),
        ("fp16", HOPPER, (90,), True),
        ("bf16", POINTERS, (80, 90), False),
        ("fp16", POINTERS, (80, 90), False),
        ("fp32", FLOAT32, (80, 90), False),
    ):
        for extras in (False, True):
            flags = {"HAS_BIAS": extras, "HAS_TEMPERATURE": extras, "ENTROPY": extras, "TMA": tma, "PRECISION": "ieee"}
            flags |= {"SPLIT_TILES": SPLIT_COLUMNS // options["BLOCK_V"], "GROUP": GROUP}
            signature = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
            signature |= {"bias_ptr": f"*{dtype}" if extras else None}
            signature |= {"inverse_temperature_ptr": "*fp32" if extras else None, "target_ptr": "*i64"}
            signature |= {"partial_ptr": "*fp32"}
            sizes = ("rows", "vocabulary", "width", "hidden_stride", "weight_stride", "partial_stride")
            signature |= dict.fromkeys((*sizes, "row_blocks", "splits"), "i32")
            yield forward_kernel, signature, flags, {**options, "capabilities": capabilities}
    for entropy in (False, True):
        signature = dict.fromkeys(("partial_ptr", "logprob_ptr", "entropy_ptr", "lse_ptr"), "*fp32")
        signature |= dict.fromkeys(("rows", "splits", "partial_stride"), "i32")
        yield merge_kernel, signature, {"ENTROPY": entropy}, MERGE
