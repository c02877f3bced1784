"""Triton kernels of ``policy_loss``: one launch forward, one backward; twin of hiexp/ops/_policy_terms.py.

Bound by memory and, at the usual sizes, by launch: one program handles BLOCK tokens, reads every input once and writes
the gradient coefficient of each token and one row of statistics. The rows are added up in a fixed order afterwards,
without atomics, so results are the same every time. float32 only.

What varies from batch to batch (tokens, kl_coef) is a run-time argument; names and clip bounds are compiled in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hiexp.ops._policy_terms import LOG_RATIO_LIMIT, MAXIMA, SUMS

# 1024 tokens over 4 warps: two 16-byte loads a thread and input; 64k tokens give 64 programs.
FORWARD = {"BLOCK": 1024, "num_warps": 4}
BACKWARD = {"BLOCK": 4096, "num_warps": 4}

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
COLUMNS = len(SUMS) + len(MAXIMA)
WIDTH = tl.constexpr(16)  # row stride of the statistics, which keeps the rows aligned
# Columns of the statistics.
LOSS, RATIO, APPROX_KL, CLIP_LOW, CLIP_HIGH, CLIP_DUAL = map(tl.constexpr, range(6))
KL_REF, IMPORTANCE, TRUNCATED, ENGINE_KL, ENGINE_GAP, NONFINITE = map(tl.constexpr, range(6, len(SUMS)))
RATIO_MAX, IMPORTANCE_MAX = map(tl.constexpr, range(len(SUMS), COLUMNS))


@triton.jit
def clip(x, low, high):
    """Keeps NaN, which tl.clamp and tl.minimum may drop."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def excess(x):
    """exp(x) - 1 - x; a Taylor polynomial near 0, where the difference would cancel."""
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0))))
    return tl.where(tl.abs(x) < 0.25, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def is_bad(x):
    """1 where x is NaN or infinite."""
    return tl.where(tl.abs(x) <= 3.4028234663852886e38, 0.0, 1.0)


@triton.jit
def put(row_ptr, column, values, keep):
    tl.store(row_ptr + column, tl.sum(tl.where(keep, values, 0.0), axis=0))


@triton.jit(do_not_specialize=["tokens", "kl_coef"])
def terms_kernel(
    logprobs_ptr,
    keep_ptr,  # bool
    scale_ptr,
    advantage_ptr,
    old_ptr,
    ref_ptr,
    engine_ptr,
    sequence_log_ratio_ptr,  # (N,) each; the last four may be absent
    coefficient_ptr,  # (N,) out
    statistics_ptr,  # (programs, WIDTH) out
    tokens,
    kl_coef,
    CISPO: tl.constexpr,
    KL: tl.constexpr,  # 1, 2, 3: the estimator; 0: no reference
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    DUAL: tl.constexpr,  # 0: none
    TRUNCATION: tl.constexpr,  # 0: weights are reported only
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tokens
    keep = tl.load(keep_ptr + offsets, mask=inside, other=0) != 0
    row = statistics_ptr + program * WIDTH
    # Tokens that do not count are never read: they become 0, whatever they hold.
    policy = tl.load(logprobs_ptr + offsets, mask=keep, other=0.0)
    scale = tl.load(scale_ptr + offsets, mask=keep, other=0.0)
    advantage = tl.load(advantage_ptr + offsets, mask=keep, other=0.0)
    old = policy
    if old_ptr is not None:
        old = tl.load(old_ptr + offsets, mask=keep, other=0.0)
    bad = tl.maximum(tl.maximum(is_bad(policy), is_bad(old)), is_bad(advantage))
    raw = policy - old
    if sequence_log_ratio_ptr is not None:
        raw = tl.load(sequence_log_ratio_ptr + offsets, mask=keep, other=0.0)
    log_ratio = clip(raw, -LIMIT, LIMIT)
    ratio = tl.exp(log_ratio)
    put(row, RATIO, ratio, keep)
    put(row, APPROX_KL, excess(log_ratio), keep)
    below = ratio < LOW
    above = ratio > HIGH
    bounded = clip(ratio, LOW, HIGH)
    dual = ratio < 0.0  # never
    if CISPO:
        gradient = -bounded * advantage
        loss = gradient * policy
    else:
        below = below & (advantage < 0)
        above = above & (advantage > 0)
        value = tl.where(below | above, bounded, ratio)
        if DUAL > 0:
            dual = (ratio > DUAL) & (advantage < 0)
            value = tl.where(dual, DUAL, value)
        loss = -value * advantage
        gradient = tl.where(below | above | dual | (tl.abs(raw) > LIMIT), 0.0, -ratio * advantage)
    put(row, CLIP_LOW, below.to(tl.float32), keep)
    put(row, CLIP_HIGH, above.to(tl.float32), keep)
    put(row, CLIP_DUAL, dual.to(tl.float32), keep)
    weight = tl.zeros_like(policy)
    gap = tl.zeros_like(policy)
    truncated = tl.zeros_like(policy)
    engine_kl = tl.zeros_like(policy)
    if engine_ptr is not None:
        engine = tl.load(engine_ptr + offsets, mask=keep, other=0.0)
        bad = tl.maximum(bad, is_bad(engine))
        gap = tl.abs(old - engine)
        log_weight = clip(old - engine, -LIMIT, LIMIT)
        weight = tl.exp(log_weight)
        engine_kl = excess(log_weight)
        if TRUNCATION > 0:
            truncated = (weight > TRUNCATION).to(tl.float32)
            factor = tl.where(weight > TRUNCATION, TRUNCATION, weight)
            loss *= factor
            gradient *= factor
    kl = tl.zeros_like(policy)
    if KL > 0:
        ref = tl.load(ref_ptr + offsets, mask=keep, other=0.0)
        bad = tl.maximum(bad, is_bad(ref))
        kl = policy - ref
        slope = tl.full(kl.shape, 1.0, tl.float32)
        if KL == 2:
            slope = kl
            kl = 0.5 * kl * kl
        if KL == 3:
            within = kl >= -LIMIT
            negative = -tl.where(kl < -LIMIT, -LIMIT, kl)
            kl = excess(negative)
            slope = tl.where(within, -(kl + negative), 0.0)
        loss += kl_coef * kl
        gradient += kl_coef * slope
    put(row, LOSS, loss * scale, keep)
    put(row, KL_REF, kl, keep)
    put(row, IMPORTANCE, weight, keep)
    put(row, TRUNCATED, truncated, keep)
    put(row, ENGINE_KL, engine_kl, keep)
    put(row, ENGINE_GAP, gap, keep)
    put(row, NONFINITE, bad, keep)
    tl.store(row + RATIO_MAX, tl.max(tl.where(keep, ratio, 0.0), axis=0))
    tl.store(row + IMPORTANCE_MAX, tl.max(tl.where(keep, weight, 0.0), axis=0))
    tl.store(coefficient_ptr + offsets, tl.where(keep, gradient * scale, 0.0), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def scale_kernel(coefficient_ptr, upstream_ptr, out_ptr, tokens, BLOCK: tl.constexpr):
    """``out`` = ``coefficient`` times the one number at ``upstream_ptr``, (N,)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(coefficient_ptr + offsets, mask=offsets < tokens, other=0.0)
    tl.store(out_ptr + offsets, values * tl.load(upstream_ptr), mask=offsets < tokens)


def token_terms(logprobs, batch, settings):
    """See the twin; all tensors of ``batch`` contiguous float32."""
    tokens = logprobs.shape[0]
    programs = triton.cdiv(tokens, FORWARD["BLOCK"])
    coefficient = torch.empty_like(logprobs)
    statistics = torch.empty(programs, WIDTH.value, device=logprobs.device)
    if tokens == 0:
        return coefficient, torch.zeros(COLUMNS, dtype=torch.float64, device=logprobs.device)
    inputs = (logprobs, batch.keep, batch.scale, batch.advantage, batch.old, batch.ref, batch.engine,
              batch.sequence_log_ratio)  # fmt: skip
    with torch.cuda.device_of(logprobs):
        terms_kernel[(programs,)](
            *map(_aligned, inputs), coefficient, statistics, tokens, settings.kl_coef,
            CISPO=settings.kind == "cispo", KL=0 if batch.ref is None else int(settings.kl_estimator[1]),
            LOW=settings.low, HIGH=settings.high, DUAL=0.0 if settings.dual == float("inf") else settings.dual,
            TRUNCATION=settings.truncation, **FORWARD,
        )  # fmt: skip
    table = statistics.double()
    return coefficient, torch.cat([table[:, : len(SUMS)].sum(0), table[:, len(SUMS) : COLUMNS].amax(0)])


def _aligned(tensor):
    """Triton compiles anew for unaligned pointers, and the chunks of gspo start anywhere; copies of them are small."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def scale(coefficient, upstream):
    """``coefficient`` (N,) times the 0-d ``upstream``."""
    out = torch.empty_like(coefficient)
    tokens = coefficient.shape[0]
    if tokens == 0:
        return out
    with torch.cuda.device_of(coefficient):
        grid = (triton.cdiv(tokens, BACKWARD["BLOCK"]),)
        scale_kernel[grid](coefficient, upstream, out, tokens, **BACKWARD)
    return out


def compile_targets():
    """(kernel, signature, constants, options) of every configuration, for scripts/compile_kernels.py."""
    required = ("logprobs_ptr", "scale_ptr", "advantage_ptr", "coefficient_ptr", "statistics_ptr")
    optional = ("old_ptr", "ref_ptr", "engine_ptr", "sequence_log_ratio_ptr")
    bounds = {"LOW": 0.8, "HIGH": 1.28}
    plain = {"CISPO": False, "KL": 0, "DUAL": 0.0, "TRUNCATION": 0.0}
    full = {"KL": 3, "DUAL": 3.0, "TRUNCATION": 2.0}
    for given, flags in (
        ((), plain),
        (("old_ptr",), plain | {"CISPO": True}),
        (("old_ptr", "ref_ptr", "engine_ptr"), plain | full),
        (optional, plain | full | {"KL": 2}),
        (("old_ptr", "ref_ptr"), plain | {"KL": 1}),
    ):
        signature = dict.fromkeys(required, "*fp32") | {"keep_ptr": "*i1", "tokens": "i32", "kl_coef": "fp32"}
        signature |= {name: "*fp32" if name in given else None for name in optional}
        yield terms_kernel, signature, flags | bounds, FORWARD
    pointers = dict.fromkeys(("coefficient_ptr", "upstream_ptr", "out_ptr"), "*fp32")
    yield scale_kernel, pointers | {"tokens": "i32"}, {}, BACKWARD
