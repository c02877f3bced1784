"""The Triton kernels of policy_loss and linear_policy_loss against their torch twins, in float32.

On a GPU where there is one, else in the interpreter of Triton: see test_interpreter.py.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'hiexp[gpu]'")

from hiexp.ops import _policy_linear, _policy_rows
from hiexp.ops.linear_policy_loss import linear_policy_loss
from hiexp.ops.policy_loss import policy_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_interpreter.py")


def batch(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random():
        return torch.randn(tokens, generator=generator)

    old = -random().abs() - 0.1
    tensors = {
        "old_logprobs": old, "ref_logprobs": old + 0.3 * random(), "engine_logprobs": old + 0.3 * random(),
        "mask": random() > -0.8, "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "cu_seqlens": torch.tensor([0, tokens // 3, tokens // 3, tokens]),
    }  # fmt: skip
    logprobs = (old + 0.5 * random()).to(DEVICE).requires_grad_()
    return logprobs, {name: value.to(DEVICE) for name, value in tensors.items()}


def compare(results, leaves, assert_close):
    ours, twin = results
    assert_close(ours.loss, twin.loss, torch.float32)
    for mine, other in zip(*(torch.autograd.grad(1.7 * x.loss, leaves) for x in results), strict=True):
        assert_close(mine, other, torch.float32)
    assert ours.metrics == pytest.approx(twin.metrics, rel=1e-4, abs=1e-5)


OPTIONS = [
    {"kind": "grpo", "kl_coef": 0.1, "kl_estimator": "k1", "truncation": 1.3},
    {"kind": "dr_grpo", "kl_coef": 0.1, "kl_estimator": "k2", "constant_length": 50, "clip_dual": 1.5},
    {"kind": "dapo", "kl_coef": 0.0, "clip_high": 0.28},
    {"kind": "gspo", "kl_coef": 0.1, "kl_estimator": "k3", "clip_low": 0.01, "clip_high": 0.02, "truncation": 1.1},
    {"kind": "cispo", "kl_coef": 0.1, "kl_estimator": "k3", "truncation": 1.3},
]


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["kind"])
@pytest.mark.parametrize("tokens", [1, 700, 1024, 2500])
def test_equals_its_twin(options, tokens, assert_close):
    logprobs, tensors = batch(tokens)
    results = [policy_loss(logprobs, **tensors, **options, impl=impl) for impl in ("triton", "torch")]
    compare(results, [logprobs], assert_close)


@runs_kernels
@pytest.mark.parametrize("missing", [["ref_logprobs"], ["engine_logprobs"], ["ref_logprobs", "engine_logprobs"]])
def test_absent_inputs(missing, assert_close):
    logprobs, tensors = batch(40)
    tensors = {name: value for name, value in tensors.items() if name not in missing}
    results = [policy_loss(logprobs, **tensors, impl=impl) for impl in ("triton", "torch")]
    compare(results, [logprobs], assert_close)
    tensors["old_logprobs"] = None
    results = [policy_loss(logprobs, **tensors, kind="gspo", impl=impl) for impl in ("triton", "torch")]
    compare(results, [logprobs], assert_close)


@runs_kernels
def test_garbage_outside_the_mask_and_extreme_ratios(assert_close):
    logprobs, tensors = batch(64)
    dirty = logprobs.detach().clone()
    dirty[~tensors["mask"]] = math.nan
    kept = tensors["mask"].nonzero().squeeze(1)
    dirty[kept[:4]] = torch.tensor([-400.0, 300.0, 0.0, -40.0], device=DEVICE)
    dirty.requires_grad_()
    results = [policy_loss(dirty, **tensors, kl_coef=0.1, impl=impl) for impl in ("triton", "torch")]
    compare(results, [dirty], assert_close)
    assert math.isfinite(results[0].metrics["ratio_max"])


@runs_kernels
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_non_finite_logprobs_are_counted_and_not_hidden(bad):
    logprobs, tensors = batch(30)
    first = int(tensors["mask"].nonzero()[0])
    spoilt = logprobs.detach().index_fill(0, torch.tensor([first], device=DEVICE), bad)
    result = policy_loss(spoilt, **tensors, kl_coef=0.1, impl="triton")
    assert result.metrics["nonfinite_tokens"] == 1.0
    # The exponents are bounded, so only NaN reaches the loss.
    assert math.isnan(float(result.loss)) == math.isnan(bad)


@runs_kernels
def test_non_finite_advantages_are_counted():
    logprobs, tensors = batch(30)
    tensors["advantages"] = torch.tensor([math.nan, 1.0, 1.0], device=DEVICE)
    result = policy_loss(logprobs, **tensors, impl="triton")
    assert result.metrics["nonfinite_tokens"] == float(tensors["mask"][:10].sum())


@runs_kernels
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_train_on(tokens):
    logprobs = torch.zeros(tokens, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([0, tokens], device=DEVICE)
    result = policy_loss(
        logprobs, torch.zeros(tokens, device=DEVICE), torch.ones(1), mask=torch.zeros(tokens), cu_seqlens=offsets,
        impl="triton",
    )  # fmt: skip
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert not logprobs.grad.any()
    assert result.metrics["tokens"] == 0.0


@runs_kernels
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("columns", [1, 17, 2048, 5003])
@pytest.mark.parametrize("out", [torch.float32, torch.float16])
def test_rows_equal_their_twin(extras, columns, out, assert_close):
    from hiexp.kernels import policy_rows

    logits = 3 * torch.randn(4, columns, device=DEVICE)
    bias, inverse = (torch.randn(columns, device=DEVICE), torch.rand(4, device=DEVICE) + 0.5) if extras else (None,) * 2
    targets = torch.tensor([0, columns - 1, columns // 2, 0], device=DEVICE)
    copy = logits.clone()
    theirs = _policy_rows.score_torch(copy, bias, inverse, targets, entropy=extras)
    ours = policy_rows.score(logits, bias, inverse, targets, entropy=extras)
    assert_close(ours.logprobs, theirs.logprobs, torch.float32, budget=1e-5)
    assert_close(ours.entropy, theirs.entropy, torch.float32, budget=1e-5)
    expected, factor = _policy_rows.difference_torch(copy, bias, inverse, targets, theirs, torch.float32)
    difference, none = policy_rows.difference(logits, bias, inverse, targets, ours, out)
    assert none is None
    assert difference.dtype == out
    assert_close(difference, expected * factor[:, None], out)


@runs_kernels
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_linear_policy_loss_end_to_end(monkeypatch, kind, assert_close):
    """Chunks of 6 rows, V = 53: every kind of edge, forward and backward."""
    monkeypatch.setattr(_policy_linear, "_BUDGET", dict.fromkeys(("cpu", "cuda"), 6 * 53 * 4))
    _, tensors = batch(20)
    hidden = torch.randn(20, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(53, 5, device=DEVICE, requires_grad=True)
    bias = torch.randn(53, device=DEVICE, requires_grad=True)
    targets = torch.arange(20, device=DEVICE)
    for name in ("old_logprobs", "ref_logprobs", "engine_logprobs"):
        tensors[name] -= 3.0
    results = [
        linear_policy_loss(
            hidden, weight, targets, **tensors, bias=bias, temperature=0.8, kind=kind, kl_coef=0.1, truncation=1.2,
            entropy=True, impl=impl,
        )
        for impl in ("triton", "torch")
    ]  # fmt: skip
    compare(results, [hidden, weight, bias], assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_policy_loss_on_the_gpu(dtype):
    tokens, vocabulary = 300, 50_257
    hidden = torch.randn(tokens, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, 256, device="cuda") * 0.1).to(dtype).requires_grad_()
    _, tensors = batch(tokens)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    ours = linear_policy_loss(hidden, weight, targets, **tensors, kl_coef=0.1)
    copies = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = linear_policy_loss(*copies, targets, **tensors, kl_coef=0.1, impl="torch")
    assert abs(float((ours.loss - truth.loss).detach())) <= 1e-3 * (1 + abs(float(truth.loss.detach())))
    grads = torch.autograd.grad(ours.loss, [hidden, weight]), torch.autograd.grad(truth.loss, copies)
    for mine, exact in zip(*grads, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3  # TF32 may be on
        assert float((mine.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_every_configuration_is_listed_for_ahead_of_time_compilation():
    """scripts/compile_kernels.py, which test_compilation.py runs, compiles what these return."""
    from hiexp.kernels import policy_loss as loss_kernels
    from hiexp.kernels import policy_rows

    targets = [*loss_kernels.compile_targets(), *policy_rows.compile_targets()]
    names = {kernel.__name__ for kernel, *_ in targets}
    assert names == {"terms_kernel", "scale_kernel", "difference_kernel"}
    for kernel, signature, constants, options in targets:
        assert set(kernel.arg_names) == {*signature, *constants, *options} - {"num_warps"}
