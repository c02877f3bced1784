"""score_group against scoring every response alone, in float64, and what it refuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import rms_norm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from hiexp.ops._shared_prefix_layout import pack_groups
from hiexp.ops._shared_prefix_model import NAME, _attention_switched, packed_hidden_states
from hiexp.ops.score_group import score_group

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def make_model(family="llama", dtype=torch.float64, **settings):
    """A tiny model; in float64 its norms too, which transformers computes in float32 whatever the model's dtype."""
    config_type, model_type = FAMILIES[family]
    torch.manual_seed(0)
    model = model_type(config_type(**{**SIZES, **settings})).to(dtype).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and dtype == torch.float64:
            module.forward = lambda x, norm=module: rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return model


def make_ids(prefix=11, lengths=(7, 1, 0, 16)):
    draw = torch.Generator().manual_seed(1)
    sizes = [prefix, *lengths]
    ids = [torch.randint(0, SIZES["vocab_size"], (n,), generator=draw) for n in sizes]
    return ids[0], ids[1:]


def alone(model, prefix, responses, temperature=1.0):
    """Log-probs and entropies of the tokens of each response from a forward pass of its own."""
    logprobs, entropies = [], []
    for response in responses:
        logits = model(input_ids=torch.cat([prefix, response])[None], use_cache=False).logits[0]
        table = torch.log_softmax(logits[len(prefix) - 1 : -1] / temperature, -1)  # (R, V)
        logprobs.append(table.gather(1, response[:, None]).squeeze(1))
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model, logprobs, entropy=None):
    """All parameter gradients of a weighted sum, so that no two tokens are alike."""
    weights = torch.linspace(0.5, 2.0, len(logprobs), dtype=logprobs.dtype)
    total = (weights * logprobs).sum()
    if entropy is not None:
        total = total - (weights.flip(0) * entropy).sum()
    model.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_exact(actual, expected):
    """1e-10, relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("impl", ["flash", "torch", None])
def test_equals_scoring_every_response_alone(family, impl):
    model = make_model(family)
    prefix, responses = make_ids()
    logprobs, entropy = alone(model, prefix, responses, temperature=0.75)
    expected = gradients(model, logprobs, entropy)
    scores = score_group(model, prefix, responses, temperature=0.75, entropy=True, impl=impl)
    assert scores.cu_seqlens.tolist() == [0, 7, 8, 8, 24]
    assert scores.hidden is None
    assert_exact(scores.logprobs, logprobs)
    assert_exact(scores.entropy, entropy)
    assert_exact(gradients(model, scores.logprobs, scores.entropy), expected)


@pytest.mark.parametrize(("prefix", "lengths"), [(1, (5,)), (1, (1,)), (9, (1, 1)), (3, (0, 4)), (30, (34, 2))])
def test_small_and_odd_sizes(prefix, lengths):
    model = make_model()
    prefix, responses = make_ids(prefix, lengths)
    logprobs, _ = alone(model, prefix, responses)
    expected = gradients(model, logprobs)
    scores = score_group(model, prefix.tolist(), [response.numpy() for response in responses])
    assert_exact(scores.logprobs, logprobs)
    assert_exact(gradients(model, scores.logprobs), expected)


def test_mask_scores_the_chosen_tokens_in_the_same_context():
    model = make_model()
    prefix, responses = make_ids()
    mask = [[0, 1, 1, 0, 0, 1, 0], torch.tensor([False]), [], torch.arange(16) % 5 == 2]
    chosen = torch.cat([torch.as_tensor(row).bool() for row in mask])
    logprobs, _ = alone(model, prefix, responses)
    expected = gradients(model, logprobs[chosen])
    scores = score_group(model, prefix, responses, mask=mask, return_hidden=True)
    assert scores.cu_seqlens.tolist() == [0, 3, 3, 3, 6]
    assert_exact(scores.logprobs, logprobs[chosen])
    assert_exact(gradients(model, scores.logprobs), expected)
    table = torch.log_softmax(scores.hidden @ model.lm_head.weight.T, -1)
    targets = torch.cat(responses)[chosen]
    assert_exact(table.gather(1, targets[:, None]).squeeze(1), scores.logprobs)


def test_a_number_as_temperature_keeps_its_digits():
    model = make_model()
    prefix, responses = make_ids()
    exact, _ = alone(model, prefix, responses, temperature=0.7)
    assert_exact(score_group(model, prefix, responses, temperature=0.7).logprobs, exact)


def test_nothing_to_score():
    model = make_model()
    prefix, responses = make_ids()
    scores = score_group(model, prefix, responses, mask=[[0] * len(response) for response in responses])
    assert scores.logprobs.shape == (0,)
    assert scores.cu_seqlens.tolist() == [0] * 5
    scores.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_each_token_passes_the_layers_once_and_never_the_head():
    model = make_model()
    prefix, responses = make_ids()
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was applied to hidden states it should not"))
    score_group(model, prefix, responses)
    assert seen == [(1, 11 + 6 + 0 + 15)]  # the last token of a response is a target only
    seen.clear()
    score_group(model, prefix, responses, mask=[[1] + [0] * 6, [0], [], [0] * 16])
    assert seen == [(1, 11)]


class _LowRank(torch.nn.Module):
    """A LoRA layer: a frozen linear layer plus a trained product of rank 2."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (torch.nn.Parameter(torch.randn(size, dtype=torch.float64) * 0.3)
                              for size in ((2, base.in_features), (base.out_features, 2)))  # fmt: skip

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapters_inside_the_layers():
    model = make_model().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = (
            _LowRank(layer.self_attn.q_proj), _LowRank(layer.mlp.up_proj)
        )  # fmt: skip
    prefix, responses = make_ids()
    logprobs, _ = alone(model, prefix, responses)
    expected = gradients(model, logprobs)
    wrapped = SimpleNamespace(
        config=model.config, peft_config={"default": SimpleNamespace(is_prompt_learning=False)},
        get_base_model=lambda: model,
    )  # fmt: skip
    assert_exact(gradients(model, score_group(wrapped, prefix, responses).logprobs), expected)


def test_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    prefix, responses = make_ids()
    logprobs, _ = alone(model, prefix, responses)
    expected = gradients(model, logprobs)
    assert_exact(gradients(model, score_group(model, prefix, responses).logprobs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_attention(reentrant):
    model = make_model()
    prefix, responses = make_ids()
    expected = gradients(model, score_group(model, prefix, responses).logprobs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    checkpoint = model.model.layers[0]._gradient_checkpointing_func
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    logprobs = score_group(model, prefix, responses).logprobs
    assert model.config._attn_implementation == "sdpa"
    assert_exact(gradients(model, logprobs), expected)
    assert len(runs) == 2
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[0]._gradient_checkpointing_func is checkpoint


def test_no_grad_and_inference_mode():
    model = make_model()
    prefix, responses = make_ids()
    logprobs = score_group(model, prefix, responses).logprobs
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scores = score_group(model, prefix, responses)
        assert not scores.logprobs.requires_grad
        assert_exact(scores.logprobs, logprobs.detach())


def test_an_error_inside_the_model_leaves_it_as_it_was():
    model = make_model()
    prefix, responses = make_ids()

    def fail(*_):
        assert model.config._attn_implementation == NAME
        raise RuntimeError("interrupted")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        score_group(model, prefix, responses)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert_exact(score_group(model, prefix, responses).logprobs, alone(model, prefix, responses)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_another_thread_in_the_meantime_sees_ordinary_attention(family):
    model = make_model(family)
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])  # left padding: wrong unless the mask is honoured
    expected = model(input_ids=ids, attention_mask=mask).logits
    with _attention_switched(model.base_model), _attention_switched(model.base_model):
        actual = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_scoring_alone_in_bfloat16(family, assert_close):
    exact, model = make_model(family), make_model(family, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    prefix, responses = make_ids()
    truth, _ = alone(exact, prefix, responses)
    budget = (alone(model, prefix, responses)[0].double() - truth).abs().max().item()
    assert_close(score_group(model, prefix, responses).logprobs, truth, "bfloat16", budget)


def test_autocast_is_as_good_as_scoring_alone_under_autocast(assert_close):
    exact, model = make_model(), make_model(dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    prefix, responses = make_ids()
    truth, _ = alone(exact, prefix, responses)
    with torch.autocast("cpu", torch.bfloat16):
        budget = (alone(model, prefix, responses)[0].double() - truth).abs().max().item()
        scores = score_group(model, prefix, responses)
    assert_close(scores.logprobs, truth, "bfloat16", budget)
    gradient = gradients(model, scores.logprobs)
    truth = gradients(exact, score_group(exact, prefix, responses).logprobs)
    assert torch.nn.functional.cosine_similarity(gradient.double(), truth, dim=0) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_score_group_on_a_gpu(family, assert_close):
    exact = make_model(family, head_dim=8)
    model = make_model(family, torch.bfloat16, head_dim=8)
    exact.load_state_dict(model.state_dict())
    exact.cuda()
    model.cuda()
    prefix, responses = make_ids()
    prefix, responses = prefix.cuda(), [response.cuda() for response in responses]
    truth, _ = alone(exact, prefix, responses)
    budget = (alone(model, prefix, responses)[0].double() - truth).abs().max().item()
    assert_close(score_group(model, prefix, responses).logprobs, truth, "bfloat16", budget)
    assert_exact(score_group(exact, prefix, responses).logprobs, truth)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefix_ids": []}, ValueError, r"prefix_ids: expected at least one token"),
        ({"prefix_ids": [[1, 2]]}, ValueError, r"prefix_ids: expected one dimension, got int64 of shape \(1, 2\)"),
        ({"prefix_ids": [1, 41]}, ValueError, r"prefix_ids\[1\]: expected a token id in 0\.\.40, got 41"),
        ({"prefix_ids": torch.ones(3)}, TypeError, r"prefix_ids: expected integer token ids, got float32"),
        ({"prefix_ids": "text"}, TypeError, r"prefix_ids: expected integer token ids"),
        ({"response_ids": []}, ValueError, r"response_ids: expected a list of at least one response"),
        ({"response_ids": torch.ones(2, 3).long()}, ValueError, r"response_ids: expected a list .* got int64"),
        ({"response_ids": [[1], [-1]]}, ValueError, r"response_ids\[1\]\[0\]: expected a token id in 0\.\.40, got -1"),
        ({"response_ids": [[1] * 64]}, ValueError, r"at most 64 tokens .* \(max_position_embeddings\), got 65"),
        ({"mask": [[1]]}, ValueError, r"mask: expected a list of 2 masks, one a response, got 1 masks"),
        ({"mask": [[1], [1]]}, ValueError, r"mask\[1\]: expected shape \(2,\) \(response 1\), got \(1,\)"),
        ({"mask": [[1], [1, 2]]}, ValueError, r"mask\[1\]: expected bool or 0 and 1"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a finite number > 0"),
        ({"impl": "triton"}, ValueError, r"impl: expected one of 'flash', 'torch', got 'triton'"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        score_group(make_model(), **{"prefix_ids": [1, 2], "response_ids": [[3], [4, 5]], **arguments})


def test_models_that_cannot_be_packed_are_named():
    def refused(model, message):
        with pytest.raises(ValueError, match=message):
            score_group(model, [1, 2], [[3, 4, 5]])

    other = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=8, n_layer=1, n_head=1))
    refused(other, r"model: .*families llama, qwen2, qwen3, got GPT2LMHeadModel \(model_type 'gpt2'\)")
    refused(make_model().model, r"families llama, qwen2, qwen3, got LlamaModel")
    refused(object(), r"families llama, qwen2, qwen3, got object")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(make_model(rope_parameters=dynamic), r"rotary positions of type default, .*got 'dynamic'")
    refused(make_model(attention_dropout=0.1).train(), r"no attention dropout in training mode")
    model = make_model()
    model.model.layers[1].self_attn.is_causal = False
    refused(model, r"causal attention in every layer")
    model = make_model()
    model.lm_head = _LowRank(model.lm_head)
    refused(model, r"an LM head that is a plain linear layer, got _LowRank")
    prompt = SimpleNamespace(
        peft_config={"default": SimpleNamespace(is_prompt_learning=True)}, get_base_model=make_model
    )  # fmt: skip
    refused(prompt, r"families llama, qwen2, qwen3, got SimpleNamespace")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_sliding_window_is_no_obstacle_while_everything_fits_in(family):
    model = make_model(family, use_sliding_window=True, sliding_window=12, max_window_layers=1)
    assert "sliding_attention" in model.config.layer_types
    prefix, responses = make_ids(6, (6, 3))
    assert_exact(score_group(model, prefix, responses).logprobs, alone(model, prefix, responses)[0])
    prefix, responses = make_ids(6, (8, 3))
    with pytest.raises(ValueError, match=r"at most 12 tokens in prefix \+ response \(sliding_window\), got 13"):
        score_group(model, prefix, responses)


def test_several_groups_in_one_call():
    model = make_model()
    shape = [(4, (3, 5)), (7, ()), (2, (1,))]
    groups = [make_ids(p, lengths) for p, lengths in shape]
    packed = pack_groups(groups)
    hidden = packed_hidden_states(model, packed.input_ids, packed.position_ids, packed.layout)
    for group, (prefix, responses) in enumerate(groups):
        for response in range(len(responses)):
            ids = torch.cat([prefix, responses[response]])
            expected = copy.deepcopy(model).model(input_ids=ids[None]).last_hidden_state[0]
            assert_exact(hidden[packed.rows(group, response, torch.arange(len(ids)))], expected)
