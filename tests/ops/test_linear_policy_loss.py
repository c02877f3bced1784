"""linear_policy_loss against policy_loss over the float64 reference log-probs: values, gradients, chunks, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from hiexp.ops import _policy_linear
from hiexp.ops._policy_batch import DEFAULT_AGGREGATION
from hiexp.ops.linear_policy_loss import linear_policy_loss
from hiexp.ops.policy_loss import policy_loss
from hiexp.ops.token_logprobs import token_logprobs

KINDS = sorted(DEFAULT_AGGREGATION)


@dataclass
class Case:
    """A batch of 4 sequences, one of them empty, one without variance; masked targets are -100."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    old: torch.Tensor
    options: dict

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias

    def ours(self, **changes):
        return linear_policy_loss(
            self.hidden, self.weight, self.targets, self.old, torch.tensor([1.0, 1.0, -1.0, 0.5]), bias=self.bias,
            **(self.options | changes),
        )  # fmt: skip

    def truth(self):
        """In float64, through all logits, and with autograd from the log-probs to the leaves."""
        options = dict(self.options)
        temperature = options.pop("temperature", 1.0)
        options.pop("entropy", None)
        double = {k: v.double() if k.endswith("logprobs") else v for k, v in options.items()}
        scored = token_logprobs(
            self.hidden.double(), self.weight.double(), self.targets.clamp(min=0), bias=self.bias.double(),
            temperature=temperature, impl="reference",
        )  # fmt: skip
        advantages = torch.tensor([1.0, 1.0, -1.0, 0.5])
        return policy_loss(scored.logprobs, self.old.double(), advantages, **double)


def make(kind="grpo", dtype=torch.float64, lengths=(3, 0, 9, 11), width=6, vocabulary=37, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = sum(lengths)
    hidden, weight, bias = random(tokens, width), random(vocabulary, width), random(vocabulary)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    mask = torch.rand(tokens, generator=generator) < 0.8
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::5] = vocabulary - 1
    now = token_logprobs(hidden.detach(), weight.detach(), targets, bias=bias.detach(), impl="reference").logprobs
    old = (now + 0.3 * random(tokens)).to(now.dtype)
    options = {
        "mask": mask, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "kind": kind,
        "zero_variance": torch.tensor([True, False, False, False]), "engine_logprobs": old + 0.2 * random(tokens),
        "truncation": 1.2, "ref_logprobs": now + 0.3 * random(tokens), "kl_coef": 0.1,
        "constant_length": 9 if kind == "dr_grpo" else None,
    } | options  # fmt: skip
    return Case(hidden, weight, bias, torch.where(mask, targets, -100), old, options)


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks of 5 rows of 37 float64 logits, 10 of float32."""
    monkeypatch.setattr(_policy_linear, "_BUDGET", {"cpu": 5 * 37 * 8})


def check_gradients(case, ours, truth, tolerance):
    for mine, other in zip(
        torch.autograd.grad(1.7 * ours.loss, case.leaves),
        torch.autograd.grad(1.7 * truth.loss, case.leaves),
        strict=True,
    ):
        assert float((mine.double() - other.double()).abs().max()) <= tolerance * (1 + float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("extras", [{}, {"kl_coef": 0.0, "kl_estimator": "k1"}, {"kl_estimator": "k2"}])
def test_equals_policy_loss_over_all_logits(tiny_chunks, kind, aggregation, extras):
    """gspo sees a sequence of 9 rows here that no chunk holds."""
    length = 9 if aggregation == "constant" else None
    temperature = torch.linspace(0.5, 2.0, 23) if extras else 1.0
    case = make(kind, aggregation=aggregation, constant_length=length, temperature=temperature, **extras)
    ours, truth = case.ours(), case.truth()
    assert abs(float((ours.loss - truth.loss).detach())) <= 1e-10
    check_gradients(case, ours, truth, 1e-10)
    assert ours.metrics == pytest.approx(truth.metrics, rel=1e-9, abs=1e-11)


def test_a_number_as_temperature_keeps_its_digits():
    case = make("dapo", temperature=0.7)
    logits = (case.hidden @ case.weight.T + case.bias) / 0.7
    plain = torch.log_softmax(logits, 1).gather(1, case.targets.clamp(min=0)[:, None]).squeeze(1)
    options = {name: value for name, value in case.options.items() if name != "temperature"}
    exact = policy_loss(plain, case.old, torch.tensor([1.0, 1.0, -1.0, 0.5]), **options)
    assert abs(float((case.ours().loss - exact.loss).detach())) <= 1e-12
    check_gradients(case, case.ours(), exact, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 8, 100])
def test_chunks_change_nothing(monkeypatch, kind, rows):
    case = make(kind)
    whole = case.ours()
    monkeypatch.setattr(_policy_linear, "_BUDGET", {"cpu": rows * 37 * 8})
    pieces = case.ours()
    assert abs(float((whole.loss - pieces.loss).detach())) <= 1e-12
    check_gradients(case, pieces, whole, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_error_budget(tiny_chunks, kind):
    """No worse than autograd through the plain float32 logits, plus a margin."""
    case = make(kind, torch.float32, vocabulary=37, temperature=0.7)
    truth = case.truth()
    logits = (case.hidden @ case.weight.T + case.bias) / 0.7
    plain = torch.log_softmax(logits, 1).gather(1, case.targets.clamp(min=0)[:, None]).squeeze(1)
    options = {k: v for k, v in case.options.items() if k != "temperature"}
    theirs = policy_loss(plain, case.old, torch.tensor([1.0, 1.0, -1.0, 0.5]), **options)
    ours = case.ours()
    assert ours.loss.dtype == torch.float32
    grads = [torch.autograd.grad(x.loss, case.leaves) for x in (ours, theirs, truth)]
    for mine, other, exact in zip(*grads, strict=True):
        error, budget = ((x - exact).abs().max() for x in (mine, other))
        assert float(error) <= float(budget) + 2e-6 * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_accumulated_in_float32(dtype):
    """Errors are those of rounding the results to the inputs' type: far below what half-precision logits would give."""
    case = make("dapo", dtype, lengths=(40, 0, 50, 70), vocabulary=211)
    ours, truth = case.ours(), case.truth()
    assert ours.loss.dtype == torch.float32
    assert abs(float((ours.loss - truth.loss).detach())) <= 1e-6
    grads = torch.autograd.grad(ours.loss, case.leaves)
    assert [g.dtype for g in grads] == [dtype] * 3
    for mine, exact in zip(grads, torch.autograd.grad(truth.loss, case.leaves), strict=True):
        assert float((mine.double() - exact.double()).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())


def test_products_in_half_precision(monkeypatch):
    """The branch a GPU takes, with the products of float16 operands accumulated in float32 by this test."""

    def product(left, right, accumulator):
        assert left.dtype == right.dtype == torch.float16
        return left.to(accumulator) @ right.to(accumulator)

    case = make("grpo", torch.float16, vocabulary=97, denominator=1e5)  # below float16's smallest normal
    truth = case.truth()
    monkeypatch.setattr(_policy_linear, "product", product)
    monkeypatch.setattr(_policy_linear.Problem, "operand", torch.float16)
    monkeypatch.setattr(_policy_linear, "_BLOCK", 40)
    ours = case.ours()
    scaled = [torch.autograd.grad(1e5 * x.loss, case.leaves) for x in (ours, truth)]
    for mine, exact in zip(*scaled, strict=True):
        assert float((mine.double() - exact.double()).abs().max()) <= 5e-3 * (1 + float(exact.abs().max()))


def test_three_products_and_only_rows_that_need_them(monkeypatch):
    """Masked rows leave all products; rows without a gradient leave the last two."""
    shapes = []
    original = torch.mm, torch.Tensor.addmm_

    def mm(left, right, **rest):
        shapes.append(("mm", *left.shape))
        return original[0](left, right, **rest)

    def addmm(total, left, right, **rest):
        shapes.append(("addmm", *left.shape))
        return original[1](total, left, right, **rest)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "addmm_", addmm)
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(19, 4, requires_grad=True)
    # Of the 8 rows that count, 3 have advantage 0 and one is clipped.
    advantages = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 9, 9])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    targets = torch.arange(10)
    old = token_logprobs(hidden, weight, targets).logprobs.detach()
    shapes.clear()
    old[7] -= 1.0
    result = linear_policy_loss(
        hidden, weight, targets, old, advantages, mask=mask, cu_seqlens=torch.tensor([0, 10]), impl="torch"
    )
    result.loss.backward()
    assert shapes == [("mm", 8, 4), ("mm", 4, 19), ("addmm", 19, 4)]
    assert hidden.grad.any(1).tolist() == [True, False, False, False, True, True, True, False, False, False]


def test_frozen_weight_and_no_grad(monkeypatch):
    case = make()
    full = torch.autograd.grad(case.ours().loss, case.hidden)[0]
    added = []
    monkeypatch.setattr(_policy_linear._Chunks, "_add_weight", lambda *a: added.append(a[1].weight))
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    loss = case.ours().loss
    assert torch.equal(torch.autograd.grad(loss, case.hidden)[0], full)
    assert added == [None]
    with torch.no_grad():
        assert not case.ours().loss.requires_grad
    assert len(added) == 1  # no gradient product at all


def test_tied_embedding_two_calls_and_checkpoint(assert_close):
    """The same weight twice in one graph, under recomputation, and backward twice."""
    case = make("grpo")
    ids = torch.arange(23) % 37

    def loss(weight):
        hidden = weight[ids].tanh()
        options = case.options | {"mask": torch.ones(23)}
        arguments = (hidden, weight, ids, case.old, torch.tensor([1.0, 1.0, -1.0, 0.5]))
        return linear_policy_loss(*arguments, **options).loss

    single = torch.autograd.grad(loss(case.weight), case.weight)[0]
    double = loss(case.weight) + 2 * loss(case.weight)
    for _i in range(2):
        assert_close(torch.autograd.grad(double, case.weight, retain_graph=True)[0], 3 * single, "float64")
    again = torch.utils.checkpoint.checkpoint(loss, case.weight, use_reentrant=False)
    assert_close(torch.autograd.grad(again, case.weight)[0], single, "float64")


def test_autocast_changes_nothing():
    case = make("dapo", torch.float32)
    plain = case.ours().loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.ours().loss
    assert torch.equal(plain, cast)
    assert torch.equal(*(torch.autograd.grad(x, case.weight)[0] for x in (plain, cast)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_on(kind):
    case = make(kind)
    for mask, zero in ((torch.zeros(23), None), (torch.ones(23), torch.ones(4, dtype=torch.bool))):
        result = case.ours(mask=mask, zero_variance=zero)
        assert float(result.loss.detach()) == 0.0
        assert all(not g.any() for g in torch.autograd.grad(result.loss, case.leaves))
        assert result.metrics["tokens"] == 0.0


def test_no_tokens_at_all():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
    none = torch.zeros(0)
    result = linear_policy_loss(
        hidden, weight, none.long(), none, torch.zeros(1), mask=none, cu_seqlens=torch.tensor([0, 0]), entropy=True
    )
    result.loss.backward()
    assert hidden.grad.shape == (0, 4)
    assert not weight.grad.any()
    assert result.metrics["entropy"] == 0.0


def test_masked_rows_may_hold_anything():
    case = make("gspo")
    dirty = case.hidden.detach().clone()
    dirty[~case.options["mask"]] = math.nan
    clean = case.ours()
    expected = torch.autograd.grad(clean.loss, case.weight)[0]
    case.hidden = dirty.requires_grad_()
    result = case.ours()
    assert torch.equal(result.loss, clean.loss)
    grads = torch.autograd.grad(result.loss, [case.hidden, case.weight])
    assert torch.equal(grads[1], expected)
    assert not grads[0][~case.options["mask"]].any()


def test_a_non_finite_hidden_state_is_reported():
    case = make()
    hidden = case.hidden.detach().clone()
    row = int(case.options["mask"][3:].nonzero()[0]) + 3
    hidden[row] = math.nan
    case.hidden = hidden
    assert case.ours().metrics["nonfinite_tokens"] == 1.0
    assert make().ours().metrics["nonfinite_tokens"] == 0.0


def test_forbidden_tokens_and_extreme_logits():
    """A bias of -inf, all logits very negative, and logits of 1e4: no NaN, and the shift changes nothing."""
    case = make("grpo", entropy=True)
    base = case.ours()
    for shift in (-30.0, -1e4, 1e4):
        moved = replace(case, bias=case.bias + shift).ours()
        assert float((moved.loss - base.loss).detach().abs()) <= 1e-9
        assert moved.metrics["entropy"] == pytest.approx(base.metrics["entropy"], abs=1e-9)
    free = next(v for v in range(37) if v not in case.targets)
    forbidden = case.bias.detach().clone()
    forbidden[free] = -math.inf
    case.bias = forbidden.requires_grad_()
    result = case.ours()
    grads = torch.autograd.grad(result.loss, case.leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[1][free].any()
    assert math.isfinite(result.metrics["entropy"])


def test_entropy_is_that_of_token_logprobs(tiny_chunks):
    case = make(temperature=0.6)
    scored = token_logprobs(
        case.hidden, case.weight, case.targets.clamp(min=0), bias=case.bias, temperature=0.6, entropy=True,
        impl="reference",
    )  # fmt: skip
    keep = case.options["mask"].clone()
    keep[:3] = False  # zero variance
    expected = float(scored.entropy[keep].mean().detach())
    assert case.ours(entropy=True).metrics["entropy"] == pytest.approx(expected, rel=1e-12)
    assert "entropy" not in case.ours().metrics


def test_on_policy_gspo_needs_no_second_pass(tiny_chunks, monkeypatch):
    case = make("gspo")
    scored = []
    original = _policy_linear._Chunks.logprobs
    monkeypatch.setattr(
        _policy_linear._Chunks, "logprobs", lambda self, part: scored.append(part) or original(self, part)
    )
    case.ours()
    rows = int(case.options["mask"][3:].sum())
    assert sum(part.stop - part.start for part in scored) > rows  # a sequence of 9 in chunks of 5
    scored.clear()
    case.old = None
    result = case.ours()
    assert sum(part.stop - part.start for part in scored) == rows
    assert result.metrics["ratio_max"] == 1.0


def test_chunks_fit_the_budget():
    for dtype, vocabulary in ((torch.float32, 49_152), (torch.float64, 49_152), (torch.bfloat16, 151_936)):
        weight = torch.empty(vocabulary, 1, dtype=dtype)
        problem = _policy_linear.Problem(torch.empty(1, 1, dtype=dtype), weight, torch.zeros(1), None, None)
        rows = _policy_linear.chunk_rows(problem)
        assert rows % 16 == 0
        assert rows * vocabulary * problem.accumulator.itemsize <= 256 * 2**20 < 8192 * vocabulary * 4
    whole = list(_policy_linear._whole_sequences([0, 3, 4, 0, 12, 1, 1], 8))
    assert whole == [slice(0, 7), slice(7, 19), slice(19, 21)]


def test_operator_is_well_formed():
    case = make("gspo", torch.float32)
    x = case.old.float()
    arguments = (
        case.hidden, case.weight, case.targets.clamp(min=0), case.bias, None, x, None, x, torch.ones(4), torch.ones(23),
        case.options["cu_seqlens"], None, ["gspo", "k3", "sequence"], [0.8, 1.2, math.inf, 0.0, 2.0, 0.0, 0.0], "torch",
        True, [True, True, True],
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.hiexp.linear_policy_loss.default, arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_torch_compile(assert_close):
    case = make("grpo", torch.float32)

    def loss(hidden, weight):
        return linear_policy_loss(
            2 * hidden, weight, case.targets, case.old.float(), torch.tensor([1.0, 1.0, -1.0, 0.5]), **case.options
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (f(case.hidden, case.weight) for f in (compiled, loss))
    assert_close(ours, theirs, "float32")
    for pair in zip(*(torch.autograd.grad(x, [case.hidden, case.weight]) for x in (ours, theirs)), strict=True):
        assert_close(*pair, "float32")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": [0.0]}, TypeError, "hidden: expected a floating point torch tensor"),
        ({"weight": torch.zeros(7, 3)}, ValueError, "weight: expected 4 columns"),
        ({"targets": torch.zeros(2).long()}, ValueError, r"targets: expected shape \(3,\)"),
        ({"targets": torch.tensor([0, 7, 0])}, ValueError, r"targets\[1\]: expected a token id in 0..6"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(7,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
        ({"temperature": torch.tensor([1.0, -1, 1])}, ValueError, r"temperature\[1\]: expected a positive"),
        ({"old_logprobs": torch.zeros(4)}, ValueError, r"old_logprobs: expected shape \(3,\)"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages: expected shape \(1,\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: expected shape \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens: .*end at the number of tokens, 3, got 0 .. 2"),
        ({"kind": "ppo"}, ValueError, "kind: expected one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected a tensor"),
        ({"targets": torch.tensor([0, 7, 1])}, ValueError, r"targets\[1\]: .*got 7; leave .* out with mask="),
        ({"impl": "reference"}, ValueError, "impl: expected one of 'torch', 'triton'"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "weight: expected a tensor on cpu"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3).long(),
        "old_logprobs": torch.zeros(3), "advantages": torch.ones(1), "mask": torch.ones(3),
        "cu_seqlens": torch.tensor([0, 3]),
    }  # fmt: skip
    with pytest.raises(error, match=match):
        linear_policy_loss(**(arguments | change))


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_s_logprobs_come_back(kind):
    case = make(kind)
    result, truth = case.ours(), case.truth()
    counts = case.options["mask"] != 0
    counts[:3] = False  # the sequence without variance
    torch.testing.assert_close(result.logprobs[counts], truth.logprobs[counts])
    assert (result.logprobs[~counts] == 0).all()
    assert not result.logprobs.requires_grad
