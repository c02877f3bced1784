"""policy_loss: hand-computed vectors, the float64 reference, gradients, what must not count, metrics, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp import group_advantage, policy_loss
from hiexp.ops import reference
from hiexp.ops._policy_batch import DEFAULT_AGGREGATION

KINDS = sorted(DEFAULT_AGGREGATION)
LN = math.log


def tensors(*columns):
    return (torch.tensor(column, dtype=torch.float64) for column in columns)


# Two sequences of 2 and 1 tokens, advantages 1 and -2, ratios 1.5 (clipped to 1.2), 0.9; 0.5 (clipped to 0.8, A < 0).
RATIOS = [1.5, 0.9, 0.5]
BY_HAND = {
    # token terms -1.2, -0.9 | 1.6; mean over sequences of means: (-1.05 + 1.6) / 2
    "grpo": 0.275,
    # sum -0.5 over 2 sequences of length 10
    "dr_grpo": -0.5 / 20,
    # upper bound 1.28: -1.28 - 0.9 + 1.6 over 3 tokens
    "dapo": -0.58 / 3,
    # sequence ratios sqrt(1.35) = 1.1619 (inside), 0.5 -> 0.8: (-1.1619 + 1.6) / 2
    "gspo": (1.6 - math.sqrt(1.35)) / 2,
    # -clip(r) A logprob with logprobs ln(r) - 1: clipped ratios 1.2, 0.9, 0.8
    "cispo": (-1.2 * (LN(1.5) - 1) - 0.9 * (LN(0.9) - 1) + 1.6 * (LN(0.5) - 1)) / 3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_hand_computed(kind):
    old = torch.full((3,), -1.0, dtype=torch.float64)
    logprobs = old + torch.tensor(RATIOS, dtype=torch.float64).log()
    result = policy_loss(
        logprobs, old, torch.tensor([1.0, -2.0]), mask=torch.ones(3), cu_seqlens=torch.tensor([0, 2, 3]), kind=kind,
        constant_length=10 if kind == "dr_grpo" else None,
    )  # fmt: skip
    assert float(result.loss) == pytest.approx(BY_HAND[kind], rel=1e-12)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_kl_by_hand(estimator, expected):
    logprobs, ref = tensors([-1.0], [-1.5])
    result = policy_loss(
        logprobs, logprobs, torch.zeros(1), mask=torch.ones(1), cu_seqlens=torch.tensor([0, 1]), ref_logprobs=ref,
        kl_coef=2.0, kl_estimator=estimator,
    )  # fmt: skip
    assert float(result.loss) == pytest.approx(2 * expected, rel=1e-12)
    assert result.metrics["kl_ref"] == pytest.approx(expected, rel=1e-12)


def test_truncated_importance_weight_by_hand():
    # Weights e^0.5 = 1.65 and min(e^1, 2) = 2; ratio 1, advantage 1; the KL term carries no weight.
    logprobs, engine, ref = tensors([-1.0, -1.0], [-1.5, -2.0], [-1.0, -2.0])
    common = {"mask": torch.ones(2), "cu_seqlens": torch.tensor([0, 2]), "engine_logprobs": engine}
    result = policy_loss(logprobs, logprobs, torch.ones(1), truncation=2.0, **common)
    assert float(result.loss) == pytest.approx(-(math.exp(0.5) + 2) / 2, rel=1e-12)
    assert result.metrics["truncated_fraction"] == 0.5
    assert result.metrics["importance_max"] == pytest.approx(math.e)
    with_kl = policy_loss(logprobs, logprobs, torch.ones(1), truncation=2.0, ref_logprobs=ref, kl_coef=1.0, **common)
    assert float(with_kl.loss - result.loss) == pytest.approx((math.exp(-1) + 1 - 1) / 2, rel=1e-12)
    only_reported = policy_loss(logprobs, logprobs, torch.ones(1), **common)
    assert float(only_reported.loss) == -1.0
    assert only_reported.metrics["importance_max"] == pytest.approx(math.e)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    total = sum(lengths)
    numbers = st.lists(st.floats(-3.0, -0.05), min_size=total, max_size=total)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return {
        "logprobs": draw(numbers),
        "old_logprobs": draw(numbers),
        "ref_logprobs": draw(numbers),
        "engine_logprobs": draw(numbers),
        "advantages": draw(st.lists(st.sampled_from([-1.5, 0.0, 0.7]), min_size=len(lengths), max_size=len(lengths))),
        "mask": draw(st.lists(st.sampled_from([0, 1, 1]), min_size=total, max_size=total)),
        "zero_variance": draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))),
        "cu_seqlens": offsets,
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batches(),
    st.sampled_from(KINDS),
    st.sampled_from(["token", "sequence", "constant"]),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([(0.2, 0.2, None), (0.1, 0.4, 1.5)]),
)
def test_equals_the_reference(assert_close, batch, kind, aggregation, estimator, bounds):
    """Values and gradients; the operator's derivatives are written out, the reference's are autograd's."""
    options = {
        "kind": kind, "aggregation": aggregation, "kl_estimator": estimator, "kl_coef": 0.3, "truncation": 1.5,
        "clip_low": bounds[0], "clip_high": bounds[1], "clip_dual": None if kind == "cispo" else bounds[2],
    }  # fmt: skip
    options |= {"constant_length": 7} if aggregation == "constant" else {}
    floats = {k: torch.tensor(v, dtype=torch.float64) for k, v in batch.items() if k.endswith("logprobs")}
    arguments = {**batch, **floats, "logprobs": floats["logprobs"].requires_grad_()}
    expected = reference.policy_loss(**arguments, **options)
    arguments |= {k: torch.tensor(batch[k]) for k in ("mask", "cu_seqlens", "zero_variance")}
    arguments["advantages"] = torch.tensor(batch["advantages"], dtype=torch.float64)
    actual = policy_loss(**arguments, **options)
    assert_close(actual.loss, expected, "float64")
    ours, theirs = (torch.autograd.grad(x, arguments["logprobs"])[0] for x in (actual.loss, expected))
    assert_close(ours, theirs, "float64")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradcheck(kind, aggregation):
    generator = torch.Generator().manual_seed(0)
    old, ref, engine = -torch.rand(3, 12, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.6 * torch.randn(12, generator=generator, dtype=torch.float64)).requires_grad_()

    def loss(x):
        return policy_loss(
            x, old, torch.tensor([1.0, -1.0, 0.5]), mask=torch.tensor([1, 1, 0, 1] * 3),
            cu_seqlens=torch.tensor([0, 5, 6, 12]), ref_logprobs=ref, kl_coef=0.1, engine_logprobs=engine,
            truncation=1.2, kind=kind, aggregation=aggregation,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, logprobs)


def test_gspo_gradient_is_the_sequence_ratios(assert_close):
    """GSPO's gradient equals that of -s A with s = exp(mean log ratio), arXiv:2507.18071, eq. 10."""
    old = -torch.rand(6, dtype=torch.float64)
    logprobs = (old + 0.05 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 1, 1])
    result = policy_loss(logprobs, old, advantages, mask=mask, cu_seqlens=torch.tensor([0, 3, 6]), kind="gspo")
    s0 = ((logprobs - old)[[0, 2]].mean()).exp()
    s1 = ((logprobs - old)[3:].mean()).exp()
    expected = -(s0 * advantages[0] + s1 * advantages[1]) / 2
    assert_close(result.loss, expected, "float64")
    ours, theirs = (torch.autograd.grad(x, logprobs)[0] for x in (result.loss, expected))
    assert_close(ours, theirs, "float64")


def test_cispo_keeps_the_gradient_of_clipped_tokens(assert_close):
    """PPO's clip drops a token's gradient, CISPO only bounds its weight, arXiv:2506.13585, eq. 4."""
    old = torch.tensor([-2.0, -2.0], dtype=torch.float64)
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    common = {"mask": torch.ones(2), "cu_seqlens": torch.tensor([0, 2]), "aggregation": "token"}
    cispo = policy_loss(logprobs, old, torch.ones(1), kind="cispo", **common).loss
    assert_close(torch.autograd.grad(cispo, logprobs)[0], [-1.2 / 2, -1.0 / 2], "float64")
    grpo = policy_loss(logprobs, old, torch.ones(1), kind="grpo", **common).loss
    assert_close(torch.autograd.grad(grpo, logprobs)[0], [0.0, -1.0 / 2], "float64")


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_zero_variance_tokens_count_nowhere(kind, assert_close):
    """Loss, gradient and metrics equal those of the batch without them, whatever garbage they hold."""
    length = {"constant_length": 9} if kind == "dr_grpo" else {}
    old, ref, new = -torch.rand(3, 4, dtype=torch.float64)
    clean_input = new.clone().requires_grad_()
    clean = policy_loss(
        clean_input, old, torch.tensor([1.0, -1.0]), mask=torch.ones(4), cu_seqlens=torch.tensor([0, 2, 4]),
        ref_logprobs=ref, kl_coef=0.5, kind=kind, **length,
    )  # fmt: skip
    # Garbage after each sequence, a third sequence without variance, a fourth without any trained token.
    place = torch.tensor([0, 1, 3, 4])
    garbage = torch.tensor([0.0, 0, float("nan"), 0, 0, float("inf"), -1, -1, -1, float("-inf")], dtype=torch.float64)
    dirty = [garbage.index_copy(0, place, x) for x in (new, old, ref)]
    dirty_input = dirty[0].requires_grad_()
    result = policy_loss(
        dirty_input, dirty[1], torch.tensor([1.0, -1.0, 5.0, 5.0]), mask=torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 0]),
        cu_seqlens=torch.tensor([0, 3, 6, 9, 10]), zero_variance=torch.tensor([False, False, True, False]),
        ref_logprobs=dirty[2], kl_coef=0.5, kind=kind, **length,
    )  # fmt: skip
    assert_close(result.loss, clean.loss, "float64")
    assert result.metrics == pytest.approx(clean.metrics)
    clean.loss.backward()
    result.loss.backward()
    assert_close(dirty_input.grad[place], clean_input.grad, "float64")
    others = torch.ones(10, dtype=torch.bool).index_fill(0, place, False)
    assert not dirty_input.grad[others].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_train_on(kind, tokens):
    logprobs = torch.full((tokens,), -1.0, requires_grad=True)
    result = policy_loss(
        logprobs, torch.full((tokens,), -1.0), torch.ones(1), mask=torch.zeros(tokens),
        cu_seqlens=torch.tensor([0, tokens]), kind=kind, constant_length=5 if kind == "dr_grpo" else None,
    )  # fmt: skip
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert logprobs.grad.tolist() == [0.0] * tokens
    assert result.metrics["tokens"] == result.metrics["sequences"] == result.metrics["ratio_max"] == 0.0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_add_up(aggregation, assert_close):
    """With the whole batch's count as denominator, the gradients of micro-batches sum to the batch's."""
    length = {"constant_length": 8} if aggregation == "constant" else {}
    old = -torch.rand(9, dtype=torch.float64)
    logprobs = (old + 0.1 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1])
    whole = policy_loss(
        logprobs, old, advantages, mask=mask, cu_seqlens=torch.tensor([0, 2, 5, 9]), aggregation=aggregation, **length
    )
    count = whole.metrics["tokens" if aggregation == "token" else "sequences"]
    first = policy_loss(
        logprobs[:2], old[:2], advantages[:1], mask=mask[:2], cu_seqlens=torch.tensor([0, 2]),
        aggregation=aggregation, denominator=count, **length,
    )  # fmt: skip
    rest = policy_loss(
        logprobs[2:], old[2:], advantages[1:], mask=mask[2:], cu_seqlens=torch.tensor([0, 3, 7]),
        aggregation=aggregation, denominator=count, **length,
    )  # fmt: skip
    assert_close(first.loss + rest.loss, whole.loss, "float64")


def test_token_advantages_equal_sequence_advantages(assert_close):
    old, new = -torch.rand(2, 7, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 7])
    common = {"mask": torch.ones(7), "cu_seqlens": offsets}
    per_token = group_advantage(torch.tensor([1.0, 0.0]), [0, 0], cu_seqlens=offsets)
    by_token = policy_loss(new, old, per_token.token_advantages, **common).loss
    by_sequence = policy_loss(new, old, per_token.advantages, **common).loss
    assert_close(by_token, by_sequence, "float64")


def test_metrics_by_hand():
    old = torch.zeros(4, dtype=torch.float64)
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64).log()
    # Only the first (above, A > 0) and last (below, A < 0) are clipped: the others' gradients point back inside.
    result = policy_loss(
        logprobs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), mask=torch.ones(4), cu_seqlens=torch.tensor([0, 2, 4])
    ).metrics
    assert (result["clip_fraction_high"], result["clip_fraction_low"], result["clip_fraction"]) == (0.25, 0.25, 0.5)
    assert result["ratio_mean"] == pytest.approx(1.0)
    assert result["ratio_max"] == pytest.approx(1.5)
    assert result["approx_kl"] == pytest.approx(-(LN(1.5) + LN(0.5)) / 2)
    assert (result["tokens"], result["sequences"], result["denominator"]) == (4.0, 2.0, 2.0)


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([0.0, -400.0], requires_grad=True)
    result = policy_loss(
        logprobs, torch.tensor([-400.0, 0.0]), torch.tensor([-1.0]), mask=torch.ones(2),
        cu_seqlens=torch.tensor([0, 2]), ref_logprobs=torch.tensor([-400.0, 0.0]), kl_coef=0.1,
    )  # fmt: skip
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert torch.isfinite(logprobs.grad).all()
    assert all(map(math.isfinite, result.metrics.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "engine_logprobs"])
def test_half_precision_logprobs_are_refused(name, dtype):
    given = {key: torch.tensor([-1.0, -2.0]) for key in ("logprobs", "old_logprobs", "ref_logprobs", "engine_logprobs")}
    given[name] = given[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name}: expected float32 or float64 log-probs, got {str(dtype)[6:]}"):
        policy_loss(**given, advantages=torch.ones(1), mask=torch.ones(2), cu_seqlens=torch.tensor([0, 2]))


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "mask"])
def test_mixed_devices_are_named(name):
    given = {
        "logprobs": torch.zeros(2), "old_logprobs": torch.zeros(2), "advantages": torch.ones(2), "mask": torch.ones(2),
    }  # fmt: skip
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, where logprobs are, got one on meta"):
        policy_loss(**given, cu_seqlens=torch.tensor([0, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_without_old_logprobs_the_policy_is_its_own_old_one(kind, assert_close):
    logprobs = -torch.rand(5, dtype=torch.float64).requires_grad_()
    common = {
        "mask": torch.tensor([1, 1, 0, 1, 1]), "cu_seqlens": torch.tensor([0, 3, 5]), "kind": kind,
        "constant_length": 4 if kind == "dr_grpo" else None, "engine_logprobs": -torch.rand(5), "truncation": 1.1,
    }  # fmt: skip
    ours = policy_loss(logprobs, None, torch.tensor([1.0, -1.0]), **common)
    theirs = policy_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), **common)
    assert_close(ours.loss, theirs.loss, "float64")
    assert ours.metrics == pytest.approx(theirs.metrics)
    gradients = [torch.autograd.grad(x.loss, logprobs)[0] for x in (ours, theirs)]
    assert_close(*gradients, "float64")


def test_dual_clip_by_hand():
    # Ratios 5 and 2, advantage -1: the first is bounded by 3 and gets no gradient, the second gets -r A = 2.
    logprobs = torch.tensor([5.0, 2.0], dtype=torch.float64).log().requires_grad_()
    result = policy_loss(
        logprobs, torch.zeros(2), torch.tensor([-1.0]), mask=torch.ones(2), cu_seqlens=torch.tensor([0, 2]),
        clip_dual=3.0,
    )  # fmt: skip
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx((3 + 2) / 2)
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1.0])
    assert result.metrics["clip_fraction"] == result.metrics["clip_fraction_dual"] == 0.5


@pytest.mark.parametrize("difference", [25.0, -25.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_far_from_the_reference(difference, estimator):
    """Only k3 below -20, where its exponential explodes, is bounded; elsewhere the pull back must not vanish."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    result = policy_loss(
        logprobs, None, torch.zeros(1), mask=torch.ones(1), cu_seqlens=torch.tensor([0, 1]),
        ref_logprobs=logprobs.detach() - difference, kl_coef=1.0, kl_estimator=estimator,
    )  # fmt: skip
    result.loss.backward()
    slope = {"k1": 1.0, "k2": difference, "k3": 1.0 - math.exp(-25) if difference > 0 else 0.0}[estimator]
    assert float(logprobs.grad) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "ref_logprobs", "engine_logprobs"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_non_finite_logprobs_are_counted(which, bad):
    arguments = {name: -torch.ones(4) for name in ("logprobs", "old_logprobs", "ref_logprobs", "engine_logprobs")}
    arguments[which] = torch.tensor([-1.0, bad, bad, -1.0])
    result = policy_loss(
        **arguments, advantages=torch.ones(1), mask=torch.tensor([1, 1, 0, 1]), cu_seqlens=torch.tensor([0, 4])
    )
    assert result.metrics["nonfinite_tokens"] == 1.0


def test_non_finite_advantages_are_counted():
    x, advantages = -torch.ones(4), torch.tensor([1.0, math.nan])
    common = {"mask": torch.tensor([1, 1, 0, 1]), "cu_seqlens": torch.tensor([0, 1, 4])}
    assert policy_loss(x, x, advantages, **common).metrics["nonfinite_tokens"] == 2.0


def test_zero_variance_groups_pay_no_kl():
    """Left in, a group without reward variance has advantage 0 but its KL term still moves the policy."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])
    group = group_advantage(rewards, [0, 0, 1, 1])
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    common = {"mask": torch.ones(4), "cu_seqlens": torch.arange(5), "ref_logprobs": torch.full((4,), -2.0)}
    result = policy_loss(
        logprobs, None, group.advantages, kl_coef=0.1, zero_variance=group.zero_variance, aggregation="token", **common
    )
    result.loss.backward()
    assert logprobs.grad[:2].tolist() == [0.0, 0.0]
    assert logprobs.grad[2:].all()
    assert (result.metrics["tokens"], result.metrics["denominator"]) == (2.0, 2.0)


def test_singleton_groups_add_nothing():
    group = group_advantage(torch.tensor([3.0, 1.0, 0.0]), [7, 8, 8])
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    result = policy_loss(
        logprobs, None, group.advantages, mask=torch.ones(3), cu_seqlens=torch.arange(4),
        zero_variance=group.zero_variance,
    )  # fmt: skip
    result.loss.backward()
    assert float(logprobs.grad[0]) == 0.0
    assert result.metrics["sequences"] == 2.0


def test_operators_are_well_formed():
    """Schema, fake implementation and autograd registration, as torch.compile relies on them."""
    x = torch.linspace(-2, -1, 5)
    arguments = (
        x.clone().requires_grad_(), x, None, x, torch.ones(2), torch.ones(5), torch.tensor([0, 2, 5]), None,
        ["gspo", "k3", "sequence"], [0.8, 1.2, math.inf, 0.0, 2.0, 0.0, 0.0], "torch",
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hiexp.policy_loss.default, arguments, test_utils=checks)
    backward = torch.ops.hiexp.policy_loss_backward.default
    torch.library.opcheck(backward, (x, torch.tensor(2.0), "torch"), test_utils=checks)


def test_torch_compile_sees_one_graph(assert_close):
    """Also for another number of tokens, without a third compilation."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(logprobs, old, advantages, mask, offsets):
        return policy_loss(2 * logprobs, old, advantages, mask=mask, cu_seqlens=offsets, kind="dapo").loss

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for tokens in (6, 9, 14):
        inputs = (-torch.rand(tokens, requires_grad=True), -torch.rand(tokens), torch.tensor([1.0, -1.0]))
        arguments = (*inputs, torch.ones(tokens), torch.tensor([0, 3, tokens]))
        ours, theirs = compiled(*arguments), loss(*arguments)
        assert_close(ours, theirs, "float32")
        assert_close(*(torch.autograd.grad(x, inputs[0])[0] for x in (ours, theirs)), "float32")
    assert len(graphs) <= 2


X, ONE, OFFSETS = torch.zeros(3), torch.ones(1), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logprobs": [0.0] * 3}, TypeError, "logprobs: expected a floating point torch tensor"),
        ({"logprobs": torch.zeros(1, 3)}, ValueError, "logprobs: expected a 1-D tensor of packed tokens"),
        ({"old_logprobs": [0.0] * 3}, TypeError, "old_logprobs: expected a floating point torch tensor .*got list"),
        ({"clip_dual": 1.0}, ValueError, "clip_dual: expected a finite number > 1"),
        ({"clip_dual": 3.0, "kind": "cispo"}, ValueError, "clip_dual: expected None with kind 'cispo'"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'torch', 'triton'"),
        ({"impl": "triton", "logprobs": X.double()}, ValueError, 'impl: expected "torch" for float64'),
        ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs: expected shape \(3,\)"),
        ({"ref_logprobs": torch.zeros(4)}, ValueError, r"ref_logprobs: expected shape \(3,\)"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages: expected shape \(1,\), one a sequence, or \(3,\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: expected shape \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens: .*end at the number of tokens, 3, got 0 .. 2"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 2]), "advantages": torch.zeros(2)},
            ValueError,
            r"cu_seqlens\[2\]: expected an offset >= 3",
        ),
        ({"cu_seqlens": torch.zeros(0).long()}, ValueError, "cu_seqlens: expected at least 1 offset"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens: expected a 1-D integer array"),
        ({"kind": "ppo"}, ValueError, "kind: expected one of 'grpo', .*got 'ppo'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of 'k1', 'k2', 'k3'"),
        ({"aggregation": "mean"}, ValueError, "aggregation: expected one of 'token'"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected a finite number >= 0"),
        ({"clip_high": float("nan")}, ValueError, "clip_high: expected a finite number >= 0"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected a tensor .*because kl_coef is 0.1"),
        ({"truncation": 2.0}, ValueError, "engine_logprobs: expected a tensor .*because truncation is 2.0"),
        ({"truncation": 0.0, "engine_logprobs": X}, ValueError, "truncation: expected a finite number > 0"),
        ({"kind": "dr_grpo"}, ValueError, "constant_length: expected a number of tokens"),
        ({"constant_length": 5}, ValueError, "constant_length: .*None otherwise, got 5 with 'sequence'"),
        ({"denominator": 0}, ValueError, "denominator: expected a finite number > 0"),
        ({"zero_variance": torch.zeros(1)}, TypeError, "zero_variance: expected a bool tensor"),
        ({"zero_variance": torch.zeros(3, dtype=torch.bool)}, ValueError, r"zero_variance: expected shape \(1,\)"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"logprobs": X, "old_logprobs": X, "advantages": ONE, "mask": torch.ones(3), "cu_seqlens": OFFSETS}
    with pytest.raises(error, match=match):
        policy_loss(**(arguments | change))
