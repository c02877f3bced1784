"""token_logprobs against the plain path (log_softmax over all logits) and other libraries that are installed.

    python benchmarks/bench_token_logprobs.py                  # CPU table, rivals interleaved, median wall clock
    pytest benchmarks/bench_token_logprobs.py -k cuda          # GPU shapes

Work: T tokens, H hidden size, V vocabulary. Forward is 2THV floating point operations, forward and backward 6THV where
all logits are kept and 8THV where they are computed again. TFLOP/s are of the work a provider does, by that formula.
Peak memory: see measure.py; on a CPU of a fresh process. Rivals that give only a loss (no log-prob per token) are
marked so in PROVIDERS.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

from hiexp import token_logprobs

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

GPU = torch.cuda.is_available()
# (device, dtype, T, H, V): SmolLM2-135M on a CPU; 0.5B, 7B and the shape of the published figures on a GPU.
SHAPES = [("cpu", torch.float32, 256, 576, 49152), ("cpu", torch.float32, 2048, 576, 49152)]
if GPU:
    sizes = [(8192, 896, 151936), (8192, 2048, 151936), (8192, 3584, 152064), (8192, 4096, 131072)]
    SHAPES += [("cuda", torch.bfloat16, *size) for size in sizes]
# The plain path holds four (T, V) tensors in backward; larger shapes are left to the others.
PLAIN_LIMIT = 12 * 2**30


def plain(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def hiexp_op(hidden, weight, targets, impl=None):
    return token_logprobs(hidden, weight, targets, impl=impl).logprobs


def trl_chunked(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)[0]


def liger_loss(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def liger_scaled(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)[0]


def cut_cross_entropy(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def quack_loss(hidden, weight, targets):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")


# name -> (function, multiples of THV forward and backward, package, devices)
PROVIDERS = {
    "hiexp": (hiexp_op, 8, None, ("cpu", "cuda")),
    "plain": (plain, 6, None, ("cpu", "cuda")),
    "hiexp persistent": (functools.partial(hiexp_op, impl="persistent"), 8, "triton", ("cuda",)),
    "TRL chunked": (trl_chunked, 8, "trl", ("cpu", "cuda")),
    "Liger scaled": (liger_scaled, 8, "liger_kernel", ("cuda",)),
    "Liger (loss only)": (liger_loss, 6, "liger_kernel", ("cuda",)),
    "cut-cross-entropy": (cut_cross_entropy, 8, "cut_cross_entropy", ("cuda",)),
    "quack (loss only)": (quack_loss, 6, "quack", ("cuda",)),
}


def available(provider, shape):
    _, _, package, devices = PROVIDERS[provider]
    if shape[0] not in devices or (package and importlib.util.find_spec(package) is None):
        return False
    return provider != "plain" or shape[0] == "cuda" or 16 * shape[2] * shape[4] <= PLAIN_LIMIT


def make(device, dtype, tokens, width, vocabulary):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device)


def step(provider, direction, inputs):
    """One pass; gradients are dropped so that each round does the same work."""
    with torch.set_grad_enabled(direction == "forward_backward"):
        logprobs = PROVIDERS[provider][0](*inputs)
    if direction == "forward_backward":
        logprobs.sum().backward()
        inputs[0].grad = inputs[1].grad = None
    measure.synchronize(logprobs.device)
    return logprobs.detach()


def peak_megabytes(provider, direction, shape, inputs):
    return measure.peak_megabytes(step, (provider, direction), make, (*shape[:2], 8, 8, 8), shape, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-T{s[2]}-H{s[3]}-V{s[4]}")
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_token_logprobs(benchmark, provider, direction, shape):
    if not available(provider, shape):
        pytest.skip(f"{provider} is not installed or not for {shape[0]}")
    inputs = make(*shape)
    rounds = 20 if shape[0] == "cuda" else 3
    result = benchmark.pedantic(step, args=(provider, direction, inputs), rounds=rounds, warmup_rounds=1, iterations=1)
    if result.ndim:
        truth = token_logprobs(inputs[0][:64].detach(), inputs[1].detach(), inputs[2][:64], impl="reference").logprobs
        torch.testing.assert_close(result[:64], truth, rtol=0, atol=1e-3 if shape[1] == torch.float32 else 0.05)
    multiple = 2 if direction == "forward" else PROVIDERS[provider][1]
    operations = multiple * shape[2] * shape[3] * shape[4]
    benchmark.extra_info["TFLOP/s"] = operations / benchmark.stats.stats.median / 1e12
    benchmark.extra_info["peak MB"] = peak_megabytes(provider, direction, shape, inputs)


def table_row(direction, shape, rounds):
    """Median seconds and peak megabytes of every provider at one shape; one call of each, in turn, makes a round."""
    names = [name for name in PROVIDERS if available(name, shape)]
    inputs, seconds = make(*shape), {name: [] for name in names}
    for _ in range(rounds + 1):  # the first round warms up
        for name in names:
            seconds[name].append(measure.seconds(functools.partial(step, name, direction, inputs)))
    return {
        name: (statistics.median(seconds[name][1:]), peak_megabytes(name, direction, shape, None)) for name in names
    }


def main():
    parser = argparse.ArgumentParser(description="token_logprobs on a CPU against the plain path and TRL")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 896, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--directions", nargs="+", default=["forward", "forward_backward"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "trl") if importlib.util.find_spec(name)}
    print(f"{torch.get_num_threads()} threads, {versions}, float32, seconds (peak MB)")
    print("| T | H | V | direction | hiexp | plain | TRL chunked | plain / hiexp |\n|---|---|---|---|---|---|---|---|")
    sizes = ((t, h, v) for v in arguments.vocabulary for h in arguments.hidden for t in arguments.tokens)
    for size in sizes:
        for direction in arguments.directions:
            row = table_row(direction, ("cpu", torch.float32, *size), arguments.rounds)
            cells = [
                f"{row[n][0]:.3f} ({row[n][1]:.0f})" if n in row else "-" for n in ("hiexp", "plain", "TRL chunked")
            ]
            ratio = f"{row['plain'][0] / row['hiexp'][0]:.2f}x" if "plain" in row else "-"
            print("|", " | ".join([*map(str, size), direction, *cells, ratio]), "|", flush=True)


if __name__ == "__main__":
    main()
