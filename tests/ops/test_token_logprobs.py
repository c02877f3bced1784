"""token_logprobs: values and gradients against the float64 reference, other libraries' regressions, errors, memory."""

from __future__ import annotations

import math

import pytest
import torch

from hiexp import token_logprobs
from hiexp.ops import _logprob_tiles, reference


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 rows and 16 columns, so that small inputs cross tile edges."""
    monkeypatch.setattr(_logprob_tiles, "tile_shape", lambda device: (8, 16))


def make(tokens, width, vocabulary, dtype=torch.float32, *, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (
        (scale * torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    )
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def gradients(result, inputs, seed=3):
    """Gradients of a random combination of all outputs."""
    total = 0.0
    generator = torch.Generator().manual_seed(seed)
    for output in (result.logprobs, result.entropy, result.lse):
        if output is not None:
            total = total + (output * torch.randn(output.shape, generator=generator)).sum()
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"),
    [(1, 1, 1), (1, 5, 16), (8, 3, 17), (9, 16, 15), (23, 7, 50), (16, 4, 32), (3, 129, 33), (40, 2, 1)],
)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias_temperature_entropy"])
def test_values_and_gradients_equal_the_reference(small_tiles, assert_close, tokens, width, vocabulary, extras):
    hidden, weight, targets = make(tokens, width, vocabulary, torch.float64)
    inputs, options = [hidden, weight], {}
    if extras:
        bias = torch.linspace(-2, 2, vocabulary, dtype=torch.float64).requires_grad_()
        inputs.append(bias)
        options = {"bias": bias, "temperature": torch.linspace(0.5, 1.5, tokens), "entropy": True}
    actual = token_logprobs(hidden, weight, targets, **options)
    expected = token_logprobs(hidden, weight, targets, impl="reference", **options)
    for name in ("logprobs", "entropy", "lse"):
        if getattr(expected, name) is not None:
            assert_close(getattr(actual, name), getattr(expected, name), "float64")
    for ours, theirs in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs, "float64")


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
def test_a_number_as_temperature_keeps_its_digits(impl):
    hidden, weight, targets = make(9, 5, 31, torch.float64)
    exact = torch.log_softmax(hidden @ weight.T / 0.7, 1).gather(1, targets[:, None]).squeeze(1)
    ours = token_logprobs(hidden, weight, targets, temperature=0.7, impl=impl).logprobs
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget_against_plain_torch(assert_close, dtype):
    """No worse than torch's own log_softmax in the same dtype, truth in float64 on the same rounded inputs."""
    hidden, weight, targets = make(37, 64, 5003, dtype)
    truth = reference.token_logprobs(hidden, weight, targets)[0].detach()
    plain = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).squeeze(1)
    result = token_logprobs(hidden, weight, targets)
    assert result.logprobs.dtype == torch.float32
    budget = float((plain.detach().double() - truth).abs().max())
    assert float((result.logprobs.detach().double() - truth).abs().max()) <= budget + 1e-4
    # Half-precision inputs are accumulated in float32, so the result is as good as float32 whatever the inputs are.
    assert_close(result.logprobs, truth, torch.float32, budget=1e-4)
    result.logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_gradcheck(small_tiles):
    hidden, weight, targets = make(5, 3, 19, torch.float64)
    bias = torch.randn(19, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0, 0.9])

    def function(h, w, b):
        out = token_logprobs(h, w, targets, bias=b, temperature=temperature, entropy=True)
        return out.logprobs, out.entropy, out.lse

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_operators_are_well_formed(small_tiles):
    """Schema, fake implementation and autograd registration, as torch.compile relies on them."""
    hidden, weight, targets = make(5, 3, 19)
    for entropy in (False, True):
        arguments = (hidden, weight, targets, None, torch.full((5,), 0.7), entropy, "native", False)
        torch.library.opcheck(
            torch.ops.hiexp.token_logprobs.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("shift", [-30.0, -1e4, 1e4])
def test_shift_invariance_and_all_negative_logits(small_tiles, assert_close, shift):
    # V = 50 is no multiple of 16. Padding columns counted as logit 0 would be off by 20 nats for the shift -30.
    hidden, weight, targets = make(11, 6, 50)
    moved = token_logprobs(hidden, weight, targets, bias=torch.full((50,), shift), entropy=True)
    still = token_logprobs(hidden, weight, targets, entropy=True)
    lost = abs(shift) * 2**-23 * 4  # rounding of logit + shift
    assert_close(moved.logprobs, still.logprobs, "float32", budget=lost)
    assert_close(moved.entropy, still.entropy, "float32", budget=lost)
    assert_close(moved.lse, still.lse + shift, "float32")


@pytest.mark.parametrize("target", [0, 15, 16, 48, 49])
def test_target_in_first_last_and_edge_columns(small_tiles, assert_close, target):
    hidden, weight, _ = make(9, 6, 50, torch.float64)
    targets = torch.full((9,), target)
    expected = torch.log_softmax(hidden @ weight.T, -1)[:, target]
    assert_close(token_logprobs(hidden, weight, targets).logprobs, expected, "float64")


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_result_does_not_depend_on_the_chunk(monkeypatch, assert_close, chunk):
    hidden, weight, targets = make(30, 6, 70, torch.float64)
    expected = token_logprobs(hidden, weight, targets, entropy=True)
    expected_gradients = gradients(expected, [hidden, weight])
    monkeypatch.setattr(_logprob_tiles, "tile_shape", lambda device: (chunk, 9))
    actual = token_logprobs(hidden, weight, targets, entropy=True)
    assert_close(actual.logprobs, expected.logprobs, "float64")
    for ours, theirs in zip(gradients(actual, [hidden, weight]), expected_gradients, strict=True):
        assert_close(ours, theirs, "float64")


def test_logprobs_never_positive_entropy_never_negative():
    # One logit far above the others: the target's probability rounds to 1.
    weight = torch.zeros(1000, 4)
    weight[7] = 50.0
    out = token_logprobs(torch.ones(64, 4), weight, torch.full((64,), 7), entropy=True)
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    assert out.logprobs.abs().max() < 1e-6


def test_uniform_distribution(assert_close):
    out = token_logprobs(torch.zeros(3, 4), torch.randn(5003, 4), torch.tensor([0, 1, 5002]), entropy=True)
    assert_close(out.logprobs, torch.full((3,), -math.log(5003)), "float32")
    assert_close(out.entropy, torch.full((3,), math.log(5003)), "float32")


def test_forbidden_tokens_have_bias_minus_infinity(small_tiles, assert_close):
    # The first tile is forbidden as a whole: its maximum is -inf.
    hidden, weight, _ = make(6, 4, 40, torch.float64)
    bias = torch.zeros(40, dtype=torch.float64)
    bias[:20] = -torch.inf
    targets = torch.tensor([20, 25, 30, 35, 38, 39])
    actual = token_logprobs(hidden, weight, targets, bias=bias, entropy=True)
    expected = token_logprobs(hidden, weight[20:], targets - 20, entropy=True)
    assert_close(actual.logprobs, expected.logprobs, "float64")
    assert_close(actual.entropy, expected.entropy, "float64")
    ours, theirs = gradients(actual, [hidden, weight]), gradients(expected, [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, "float64")


def test_rows_by_mask_and_by_index(small_tiles, assert_close):
    hidden, weight, targets = make(20, 5, 33, torch.float64)
    temperature = torch.linspace(0.5, 2, 20)
    mask = torch.arange(20) % 3 == 1
    padded = torch.where(mask, targets, -100)  # padding outside the rows is legal
    everything = token_logprobs(hidden, weight, targets, temperature=temperature, entropy=True)
    by_mask = token_logprobs(hidden, weight, padded, rows=mask, temperature=temperature, entropy=True)
    by_index = token_logprobs(
        hidden, weight, padded, rows=mask.nonzero().squeeze(1), temperature=temperature, entropy=True
    )
    for name in ("logprobs", "entropy", "lse"):
        assert_close(getattr(by_mask, name), getattr(everything, name)[mask], "float64")
        assert_close(getattr(by_index, name), getattr(everything, name)[mask], "float64")
    (grad,) = torch.autograd.grad(by_mask.logprobs.sum(), hidden)
    assert not grad[~mask].any()
    assert grad[mask].any(dim=1).all()


@pytest.mark.parametrize("rows", [torch.zeros(4, dtype=torch.bool), torch.empty(0, dtype=torch.int64)])
def test_all_rows_masked(rows):
    hidden, weight, targets = make(4, 3, 7)
    out = token_logprobs(hidden, weight, targets, rows=rows, entropy=True)
    assert out.logprobs.shape == out.entropy.shape == out.lse.shape == (0,)
    out.logprobs.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_tokens_at_all():
    out = token_logprobs(torch.empty(0, 3), torch.randn(7, 3), torch.empty(0, dtype=torch.int64))
    assert out.logprobs.shape == (0,)


def test_upstream_gradient_is_per_token(small_tiles, assert_close):
    """Rows with zero upstream gradient leave the products; the others keep their own factor."""
    hidden, weight, targets = make(20, 5, 33, torch.float64)
    factors = torch.linspace(-1, 1, 20, dtype=torch.float64)
    factors[::3] = 0.0
    ours = torch.autograd.grad((token_logprobs(hidden, weight, targets).logprobs * factors).sum(), [hidden, weight])
    plain = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    theirs = torch.autograd.grad((plain * factors).sum(), [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, "float64")


def test_entropy_gradient_alone(small_tiles, assert_close):
    hidden, weight, targets = make(9, 5, 33, torch.float64)
    ours = torch.autograd.grad(token_logprobs(hidden, weight, targets, entropy=True).entropy.sum(), [hidden, weight])
    logprobs = torch.log_softmax(hidden @ weight.T, -1)
    theirs = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        assert_close(mine, other, "float64")


def test_frozen_weight_and_frozen_hidden(assert_close):
    hidden, weight, targets = make(9, 5, 33, torch.float64)
    both = torch.autograd.grad(token_logprobs(hidden, weight, targets).logprobs.sum(), [hidden, weight])
    (only_hidden,) = torch.autograd.grad(token_logprobs(hidden, weight.detach(), targets).logprobs.sum(), hidden)
    (only_weight,) = torch.autograd.grad(token_logprobs(hidden.detach(), weight, targets).logprobs.sum(), weight)
    assert_close(only_hidden, both[0], "float64")
    assert_close(only_weight, both[1], "float64")
    assert not token_logprobs(hidden.detach(), weight.detach(), targets).logprobs.requires_grad


def test_two_calls_in_one_graph_and_tied_embeddings(small_tiles, assert_close):
    embedding = torch.randn(33, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(9)

    def loss(score):
        hidden = embedding[targets].tanh()
        return (score(hidden) * 0.3 + score(hidden.flip(0)) ** 2).sum()

    ours = torch.autograd.grad(loss(lambda h: token_logprobs(h, embedding, targets).logprobs), embedding)[0]
    theirs = torch.autograd.grad(
        loss(lambda h: torch.log_softmax(h @ embedding.T, -1).gather(1, targets[:, None]).squeeze(1)), embedding
    )[0]
    assert_close(ours, theirs, "float64")


def test_scalar_and_per_row_temperature_agree(assert_close):
    hidden, weight, targets = make(9, 5, 33, torch.float64)
    expected = torch.log_softmax(hidden @ weight.T / 0.7, -1).gather(1, targets[:, None]).squeeze(1)
    for temperature in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64)):
        actual = token_logprobs(hidden, weight, targets, temperature=temperature).logprobs
        assert_close(actual, expected, "float32")


def test_strided_inputs_and_mixed_dtypes(assert_close):
    hidden, weight, targets = make(10, 6, 33, torch.float64)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    transposed = weight.T.contiguous().T
    expected = reference.token_logprobs(hidden, weight, targets)[0]
    assert_close(token_logprobs(strided, transposed, targets.int()).logprobs, expected, "float64")
    mixed = token_logprobs(hidden.bfloat16(), weight.float(), targets).logprobs
    assert_close(mixed, reference.token_logprobs(hidden.bfloat16(), weight.float(), targets)[0], "float32")


def test_autocast_does_not_lower_the_precision(assert_close):
    hidden, weight, targets = make(10, 64, 333)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logprobs(hidden, weight, targets)
    assert_close(out.logprobs, reference.token_logprobs(hidden, weight, targets)[0], "float32", budget=1e-5)


def test_logits_never_exist_as_a_whole(monkeypatch):
    """No product of the forward or backward pass is larger than a tile, or than a gradient."""
    sizes = []
    original = _logprob_tiles.product

    def recorded(left, right, accumulator, out=None):
        result = original(left, right, accumulator, out)
        sizes.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(_logprob_tiles, "product", recorded)
    hidden, weight, targets = make(1500, 4, 9000)
    token_logprobs(hidden, weight, targets, entropy=True).entropy.sum().backward()
    assert len(sizes) > 2
    assert max(sizes) < 1500 * 9000 * 4 / 3
    for device in ("cpu", "cuda"):
        rows, columns = _logprob_tiles.tile_shape(torch.device(device))
        assert 2 * rows * columns * 4 <= 256 * 2**20


H, W, T = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 6])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((H.numpy(), W, T), {}, TypeError, r"hidden: expected a floating point torch tensor \(T, H\), got float32"),
        ((H[None], W, T), {}, ValueError, "hidden: expected a 2-D tensor"),
        ((H, W[:, :2], T), {}, ValueError, "weight: expected 3 columns"),
        ((H, W[:0], T), {}, ValueError, "weight: expected at least one vocabulary row"),
        ((H, W, T.float()), {}, TypeError, "targets: expected an integer torch tensor"),
        ((H, W, T[:3]), {}, ValueError, r"targets: expected shape \(4,\) .*got \(3,\)"),
        ((H, W, torch.tensor([0, 7, 2, 3])), {}, ValueError, r"targets\[1\]: expected a token id in 0..6 .*got 7"),
        ((H, W, torch.tensor([0, 1, -100, 3])), {}, ValueError, r"targets\[2\]: .*got -100; leave masked tokens out"),
        ((H, W, T), {"bias": [0.0] * 7}, TypeError, "bias: expected a torch tensor"),
        ((H, W, T), {"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(7,\)"),
        ((H, W, T), {"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ((H, W, T), {"temperature": "hot"}, TypeError, "temperature: expected a number"),
        ((H, W, T), {"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \(4,\)"),
        ((H, W, T), {"temperature": torch.tensor([1, 1, -1, 1.0])}, ValueError, r"temperature\[2\]: expected a pos"),
        ((H, W, T), {"temperature": torch.ones(4, requires_grad=True)}, ValueError, "temperature: .*without gradient"),
        ((H, W, T), {"rows": torch.ones(3, dtype=torch.bool)}, ValueError, r"rows: expected shape \(4,\)"),
        ((H, W, T), {"rows": torch.tensor([0, 4])}, ValueError, r"rows: expected indices in 0..3, got 0 .. 4"),
        ((H, W, T), {"rows": torch.ones(4)}, TypeError, "rows: expected a bool mask"),
        ((H, W, T), {"entropy": "yes"}, TypeError, "entropy: expected True or False, got str 'yes'"),
        (
            (H, W, T),
            {"impl": "cuda"},
            ValueError,
            "impl: expected one of 'native', 'torch', 'triton', 'persistent', 'reference', got 'cuda'",
        ),
    ],
)
def test_errors_name_the_argument(arguments, options, error, match):
    with pytest.raises(error, match=match):
        token_logprobs(*arguments, **options)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match='impl: expected "native", "torch" or "reference" for tensors on a CPU, got "triton"'
    ):
        token_logprobs(H, W, T, impl="triton")
