"""paired_logprobs: values and gradients against the float64 reference, properties of the KL, errors, bounded memory."""

from __future__ import annotations

import pytest
import torch

from hiexp import token_logprobs
from hiexp.ops import _logprob_pair, _logprob_tiles
from hiexp.ops.paired_logprobs import paired_logprobs

NAMES = ("logprobs_a", "logprobs_b", "kl", "lse_a", "lse_b")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 rows and 16 columns, so that small inputs cross tile edges."""
    for module in (_logprob_tiles, _logprob_pair):
        monkeypatch.setattr(module, "tile_shape", lambda device: (8, 16))


def make(tokens, width, vocabulary, dtype=torch.float64, *, width_b=None):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    hidden_b = random(tokens, width_b or width)
    weight_b = random(vocabulary, width_b) if width_b else None
    return random(tokens, width), hidden_b, random(vocabulary, width), weight_b, torch.randint(0, vocabulary, (tokens,))


def gradients(result, inputs):
    generator = torch.Generator().manual_seed(3)
    outputs = [getattr(result, name) for name in NAMES]
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_number_as_temperature_keeps_its_digits(impl):
    hidden_a, hidden_b, weight, _, targets = make(9, 5, 31)
    tables = [torch.log_softmax(hidden @ weight.T / 0.7, 1) for hidden in (hidden_a, hidden_b)]
    exact = (tables[0].exp() * (tables[0] - tables[1])).sum(1)
    ours = paired_logprobs(hidden_a, hidden_b, weight, targets, temperature=0.7, impl=impl)
    torch.testing.assert_close(ours.kl, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.logprobs_b, tables[1].gather(1, targets[:, None]).squeeze(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 16), (8, 3, 17), (23, 7, 50), (16, 129, 32), (9, 2, 1)])
@pytest.mark.parametrize("width_b", [None, 6], ids=["shared", "two_weights"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias_temperature"])
def test_values_and_gradients_equal_the_reference(small_tiles, assert_close, shape, width_b, extras):
    hidden_a, hidden_b, weight, weight_b, targets = make(*shape, width_b=width_b)
    inputs, options = [hidden_a, hidden_b, weight], {"weight_b": weight_b}
    inputs += [] if weight_b is None else [weight_b]
    if extras:
        bias = torch.linspace(-2, 2, shape[2], dtype=torch.float64).requires_grad_()
        inputs.append(bias)
        options |= {"bias": bias, "temperature": torch.linspace(0.5, 1.5, shape[0])}
    actual = paired_logprobs(hidden_a, hidden_b, weight, targets, **options)
    expected = paired_logprobs(hidden_a, hidden_b, weight, targets, impl="reference", **options)
    for name in NAMES:
        assert_close(getattr(actual, name), getattr(expected, name), "float64")
    for ours, theirs in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs, "float64")


def test_gradcheck(small_tiles):
    hidden_a, hidden_b, weight, weight_b, targets = make(5, 3, 19, width_b=2)

    def function(a, b, w, v):
        out = paired_logprobs(a, b, w, targets, weight_b=v, temperature=torch.linspace(0.6, 2, 5))
        return tuple(getattr(out, name) for name in NAMES)

    assert torch.autograd.gradcheck(function, (hidden_a, hidden_b, weight, weight_b))


def test_operator_is_well_formed(small_tiles):
    hidden_a, hidden_b, weight, _, targets = make(5, 3, 19, torch.float32)
    torch.library.opcheck(
        torch.ops.hiexp.paired_logprobs.default,
        (hidden_a, hidden_b, weight, None, targets, None, None, "torch"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget_against_plain_torch(dtype):
    """The KL of nearly equal sides, where digits cancel: no worse than torch's own in float32."""
    hidden_a, _, weight, _, targets = make(29, 64, 5003, dtype)
    hidden_b = (hidden_a + 0.01 * torch.randn(29, 64)).to(dtype)
    truth = paired_logprobs(hidden_a, hidden_b, weight, targets, impl="reference")
    log_p, log_q = (torch.log_softmax(h.float() @ weight.float().T, 1) for h in (hidden_a, hidden_b))
    plain = (log_p.exp() * (log_p - log_q)).sum(1)
    ours = paired_logprobs(hidden_a, hidden_b, weight, targets)
    assert ours.kl.dtype == ours.logprobs_a.dtype == torch.float32
    assert (ours.kl - truth.kl).abs().max() <= (plain - truth.kl).abs().max() + 2e-6
    assert (ours.logprobs_b - truth.logprobs_b).abs().max() <= 1e-4


def test_kl_properties(small_tiles, assert_close):
    hidden_a, hidden_b, weight, _, targets = make(40, 6, 50, torch.float32)
    out = paired_logprobs(hidden_a, hidden_b, weight, targets)
    assert (out.kl > 0).all()
    assert (paired_logprobs(hidden_a, hidden_a, weight, targets).kl < 1e-6).all()
    swapped = paired_logprobs(hidden_b, hidden_a, weight, targets)
    assert_close(swapped.logprobs_b, out.logprobs_a, "float32")
    assert (swapped.kl - out.kl).abs().max() > 0.01  # KL is not symmetric
    alone = token_logprobs(hidden_b, weight, targets)
    assert_close(out.logprobs_b, alone.logprobs, "float32")
    shifted = paired_logprobs(hidden_a, hidden_b, weight, targets, bias=torch.full((50,), -30.0))
    assert_close(shifted.kl, out.kl, "float32", budget=5e-5)


def test_offset_between_the_sides_cancels_no_digits(assert_close):
    """Side b's logits are side a's plus 4096, exactly: the KL is 0, though both log-sum-exps differ by 4096."""
    hidden_a = torch.cat([torch.randint(-8, 9, (6, 4)) / 8.0, torch.zeros(6, 1)], 1)
    hidden_b = hidden_a.clone()
    hidden_b[:, 4] = 1.0
    weight = torch.cat([torch.randint(-8, 9, (30, 4)) / 8.0, torch.full((30, 1), 4096.0)], 1)
    out = paired_logprobs(hidden_a, hidden_b, weight, torch.arange(6))
    assert_close(out.lse_b - out.lse_a, torch.full((6,), 4096.0), "float32")
    assert (out.kl < 1e-6).all()


def test_forbidden_tokens_count_for_nothing(small_tiles, assert_close):
    hidden_a, hidden_b, weight, _, _ = make(6, 4, 40)
    bias = torch.zeros(40, dtype=torch.float64)
    bias[:20] = -torch.inf
    targets = torch.tensor([20, 25, 30, 35, 38, 39])
    actual = paired_logprobs(hidden_a, hidden_b, weight, targets, bias=bias)
    expected = paired_logprobs(hidden_a, hidden_b, weight[20:], targets - 20)
    assert_close(actual.kl, expected.kl, "float64")
    inputs = [hidden_a, hidden_b, weight]
    for ours, theirs in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs, "float64")


def test_gradient_to_one_side_only(small_tiles, assert_close):
    hidden_a, hidden_b, weight, _, targets = make(11, 5, 33)
    both = torch.autograd.grad(paired_logprobs(hidden_a, hidden_b, weight, targets).kl.sum(), [hidden_a, hidden_b])
    for frozen in (0, 1):
        sides = [hidden_a, hidden_b]
        sides[frozen] = sides[frozen].detach()
        out = paired_logprobs(*sides, weight.detach(), targets)
        (grad,) = torch.autograd.grad(out.kl.sum(), sides[1 - frozen])
        assert_close(grad, both[1 - frozen], "float64")


def test_rows_and_zero_upstream_gradients(small_tiles, assert_close):
    hidden_a, hidden_b, weight, _, targets = make(20, 5, 33)
    mask = torch.arange(20) % 3 == 1
    everything = paired_logprobs(hidden_a, hidden_b, weight, targets, temperature=torch.linspace(0.5, 2, 20))
    padded = torch.where(mask, targets, -100)
    some = paired_logprobs(hidden_a, hidden_b, weight, padded, rows=mask, temperature=torch.linspace(0.5, 2, 20))
    for name in NAMES:
        assert_close(getattr(some, name), getattr(everything, name)[mask], "float64")
    inputs = [hidden_a, hidden_b, weight]
    masked = torch.autograd.grad((everything.kl * mask).sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad(some.kl.sum(), inputs), masked, strict=True):
        assert_close(ours, theirs, "float64")
    none = paired_logprobs(hidden_a, hidden_b, weight, targets, rows=torch.zeros(20, dtype=torch.bool))
    assert none.kl.shape == (0,)
    none.kl.sum().backward()
    assert not weight.grad.any()


def test_non_finite_row_is_flagged_and_spoils_no_other(small_tiles, assert_close):
    hidden_a, hidden_b, weight, _, targets = make(12, 5, 33)
    with torch.no_grad():
        hidden_b[4, 1] = torch.nan
        hidden_a[7, 0] = torch.inf
    out = paired_logprobs(hidden_a, hidden_b, weight, targets)
    good = torch.ones(12, dtype=torch.bool)
    good[[4, 7]] = False
    assert out.finite.tolist() == good.tolist()
    ours = torch.autograd.grad(out.kl.where(out.finite, 0.0).sum(), weight)[0]
    theirs = torch.autograd.grad(paired_logprobs(hidden_a, hidden_b, weight, targets, rows=good).kl.sum(), weight)[0]
    assert_close(ours, theirs, "float64")


def test_logits_never_exist_as_a_whole(monkeypatch):
    sizes, original = [], _logprob_tiles.product

    def recorded(*arguments):
        sizes.append(original(*arguments).numel() * 4)
        return original(*arguments)

    monkeypatch.setattr(_logprob_pair, "product", recorded)
    hidden_a, hidden_b, weight, _, targets = make(1500, 4, 9000, torch.float32)
    paired_logprobs(hidden_a, hidden_b, weight, targets).kl.sum().backward()
    assert max(sizes) * 4 < 1500 * 9000 * 4
    assert weight.grad.any()


A, W, T = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 6])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((A.numpy(), A, W, T), {}, TypeError, "hidden_a: expected a floating point torch tensor"),
        ((A, A.tolist(), W, T), {}, TypeError, "hidden_b: expected a floating point torch tensor"),
        ((A, A[:3], W, T), {}, ValueError, r"targets: expected shape \(3,\) \(one target a row of hidden_b\)"),
        ((A, A[:, :2], W, T), {}, ValueError, "weight: expected 2 columns, as many as hidden_b has"),
        ((A, A[:, :2], W, T), {"weight_b": W}, ValueError, "weight_b: expected 2 columns, as many as hidden_b has"),
        ((A, A.double(), W, T), {}, TypeError, "hidden_b: expected torch.float32, the dtype of hidden_a, got float64"),
        ((A, A, W, T), {"weight_b": W[:6]}, ValueError, "weight_b: expected 7 vocabulary rows"),
        ((A, A, W, T + 1), {}, ValueError, r"targets\[3\]: expected a token id in 0..6"),
        ((A, A, W, T), {"temperature": -1.0}, ValueError, "temperature: expected a finite number > 0"),
        ((A, A, W, T), {"rows": torch.tensor([9])}, ValueError, "rows: expected indices in 0..3"),
        ((A, A, W, T), {"impl": "native"}, ValueError, "impl: expected one of 'torch', 'triton', 'reference'"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, match):
    with pytest.raises(error, match=match):
        paired_logprobs(*arguments, **options)
