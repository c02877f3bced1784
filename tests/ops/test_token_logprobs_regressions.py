"""Mistakes other fused log-prob operations have made; those not listed here are in test_token_logprobs.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hiexp import token_logprobs
from hiexp.ops import _logprob_tiles


def plain(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)


def make(tokens, width, vocabulary, dtype=torch.float64):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


def test_more_rows_than_a_16_bit_grid_dimension(assert_close):
    hidden, weight, targets = make(65_537, 2, 5)
    ours, theirs = token_logprobs(hidden, weight, targets).logprobs, plain(hidden, weight, targets)
    assert_close(ours, theirs, "float64")
    for mine, other in zip(*(torch.autograd.grad(x.sum(), [hidden, weight]) for x in (ours, theirs)), strict=True):
        assert_close(mine, other, "float64")


def test_more_columns_than_a_16_bit_grid_dimension(assert_close):
    hidden, weight, _ = make(3, 2, 70_001)
    targets = torch.tensor([0, 65_536, 70_000])
    assert_close(token_logprobs(hidden, weight, targets).logprobs, plain(hidden, weight, targets), "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoiler", [1e6, torch.nan])
def test_a_row_does_not_depend_on_the_values_of_its_neighbours(dtype, spoiler):
    hidden, weight, targets = (x.detach() for x in make(70, 33, 5003, dtype))
    before = token_logprobs(hidden, weight, targets, entropy=True)
    changed = hidden.clone()
    changed[::2] = spoiler
    after = token_logprobs(changed, weight, targets.roll(1).where(torch.arange(70) % 2 == 0, targets), entropy=True)
    for name in ("logprobs", "entropy", "lse"):
        assert torch.equal(getattr(after, name)[1::2], getattr(before, name)[1::2])


def test_misaligned_views(assert_close):
    """Labels, rows and weights that start in the middle of an allocation."""
    hidden, weight, targets = make(9, 5, 33, torch.float32)
    expected = plain(hidden[1:], weight[1:], (targets[1:] % 32))
    assert_close(token_logprobs(hidden[1:], weight[1:], (targets % 32)[1:]).logprobs, expected, "float32")
    strided = torch.stack([targets % 32, targets], 1)[1:, 0]
    assert_close(token_logprobs(hidden[1:], weight[1:], strided).logprobs, expected, "float32")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(assert_close, reentrant):
    hidden, weight, targets = make(20, 5, 33)

    def score(h):
        return token_logprobs(h.tanh(), weight, targets, entropy=True).logprobs

    direct = torch.autograd.grad(score(hidden).sum(), [hidden, weight])
    checkpoint(score, hidden, use_reentrant=reentrant).sum().backward()
    for mine, other in zip((hidden.grad, weight.grad), direct, strict=True):
        assert_close(mine, other, "float64")


def test_under_torch_compile(assert_close):
    """Values and gradients through the custom operators' fakes; lengths and temperatures change between calls."""

    def score(hidden, weight, targets, temperature):
        out = token_logprobs(hidden * 2, weight, targets, temperature=temperature, entropy=True)
        return (out.logprobs + 0.1 * out.entropy).where(out.finite, 0.0).sum()

    compiled = torch.compile(score, backend="aot_eager", dynamic=True)
    for tokens, temperature in ((5, 0.7), (9, 1.3), (12, 1.0)):
        hidden, weight, targets = make(tokens, 4, 33)
        temperatures = torch.full((tokens,), temperature)
        expected = torch.autograd.grad(score(hidden, weight, targets, temperatures), [hidden, weight])
        actual = torch.autograd.grad(compiled(hidden, weight, targets, temperatures), [hidden, weight])
        for mine, other in zip(actual, expected, strict=True):
            assert_close(mine, other, "float64")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("impl", ["native", "torch"])
def test_non_finite_hidden_row_is_flagged_and_spoils_no_other(assert_close, bad, impl):
    hidden, weight, targets = make(12, 5, 33)
    good = torch.ones(12, dtype=torch.bool)
    good[[0, 7]] = False
    with torch.no_grad():
        hidden[~good, 2] = bad
    out = token_logprobs(hidden, weight, targets, entropy=True, impl=impl)
    assert out.finite.tolist() == good.tolist()
    assert not out.finite.requires_grad
    ours = torch.autograd.grad((out.logprobs + out.entropy).where(out.finite, 0.0).sum(), weight)[0]
    alone = token_logprobs(hidden, weight, targets, rows=good, entropy=True)
    theirs = torch.autograd.grad((alone.logprobs + alone.entropy).sum(), weight)[0]
    assert_close(ours, theirs, "float64")


def test_non_finite_weight_and_forbidden_target_are_flagged():
    hidden, weight, targets = (x.detach() for x in make(6, 5, 33))
    assert token_logprobs(hidden, weight, targets).finite.all()
    bias = torch.zeros(33, dtype=torch.float64)
    bias[3] = -torch.inf
    forbidden = token_logprobs(hidden, weight, torch.tensor([1, 3, 2, 3, 4, 5]), bias=bias)
    assert forbidden.finite.tolist() == [True, False, True, False, True, True]
    assert (forbidden.logprobs[~forbidden.finite] == -torch.inf).all()
    weight[20, 1] = torch.nan
    assert not token_logprobs(hidden, weight, targets).finite.any()


@pytest.mark.parametrize("name", ["weight", "targets", "bias"])
def test_mixed_devices_are_refused(name):
    arguments = {"hidden": torch.randn(4, 3), "weight": torch.randn(7, 3), "targets": torch.arange(4)}
    arguments["bias"] = torch.zeros(7)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, where hidden is, got one on meta"):
        token_logprobs(**arguments)


def test_gradient_without_entropy_asked_for_ignores_nothing(assert_close):
    """lse and logprobs together: the constant of a row is the sum of both."""
    hidden, weight, targets = make(9, 5, 33)
    out = token_logprobs(hidden, weight, targets)
    logits = hidden @ weight.T
    ours = torch.autograd.grad((out.logprobs * 0.4 - out.lse * 1.7).sum(), [hidden, weight])
    theirs = torch.autograd.grad(
        (plain(hidden, weight, targets) * 0.4 - logits.logsumexp(1) * 1.7).sum(), [hidden, weight]
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, "float64")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", ["triton", "persistent", "torch"])
def test_device_that_is_not_the_current_one(assert_close, impl):
    hidden, weight, targets = (x.detach().to("cuda:1") for x in make(20, 64, 333, torch.float32))
    out = token_logprobs(hidden, weight, targets, impl=impl)
    assert out.logprobs.device == hidden.device
    assert_close(out.logprobs, plain(hidden.double(), weight.double(), targets), "float32", budget=1e-4)


@pytest.mark.gpu
def test_memory_on_the_gpu_stays_bounded():
    hidden = torch.randn(16_384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 151_936, (16_384,), device="cuda")  # T * V is beyond 2^31
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logprobs(hidden, weight, targets).logprobs.sum().backward()
    rows, columns = _logprob_tiles.tile_shape(hidden.device)
    assert torch.cuda.max_memory_allocated() - before < 3 * rows * columns * 4 + 2**27
