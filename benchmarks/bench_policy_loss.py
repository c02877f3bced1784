"""linear_policy_loss against other ways from hidden states to the GRPO loss and its gradients.

Run: pytest benchmarks/bench_policy_loss.py (about 15 minutes on two idle cores, 7 GB); -k cuda for the GPU shapes, -k
T512 for a look. Rivals that cannot be imported are left out.

Work: T tokens in 8 sequences, H hidden size, V vocabulary; loss with clipping and k3 KL, gradients of hidden states and
weight. ``share``: part of the tokens that is trained; search trajectories have about 0.2. TFLOP/s count 6THV, the three
products that all logits once need, whatever a provider really does, so that they compare across providers.
Peak memory: see measure.py; on a CPU of a fresh process.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hiexp.ops.linear_policy_loss import linear_policy_loss
from hiexp.ops.policy_loss import policy_loss
from hiexp.ops.token_logprobs import token_logprobs

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

GPU = torch.cuda.is_available()
SEQUENCES = 8
# (device, dtype, T, H, V, share): SmolLM2-135M and a 0.5B width on a CPU; 0.5B, 7B and the shape of the published
# figures on a GPU.
SHAPES = [("cpu", torch.float32, tokens, width, 49152, 1.0) for width in (576, 896) for tokens in (512, 2048, 8192)]
SHAPES.append(("cpu", torch.float32, 8192, 576, 49152, 0.2))
if GPU:
    sizes = [(8192, 896, 151936), (8192, 2048, 151936), (8192, 3584, 152064), (8192, 4096, 131072)]
    SHAPES += [("cuda", torch.bfloat16, *size, share) for size in sizes for share in (1.0, 0.2)]


def make(device, dtype, tokens, width, vocabulary, share):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    old = token_logprobs(hidden.detach(), weight.detach(), targets).logprobs
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "old_logprobs": old + 0.1 * torch.randn_like(old),
        "advantages": torch.linspace(-1, 1, SEQUENCES, device=device),
        "mask": torch.rand(tokens, device=device) < share,
        "cu_seqlens": torch.arange(SEQUENCES + 1, device=device) * (tokens // SEQUENCES),
        "ref_logprobs": old + 0.1 * torch.randn_like(old),
    }


LOSS = {"kind": "dapo", "clip_high": 0.2, "kl_coef": 0.04}


def fused(inputs):
    return linear_policy_loss(**inputs, **LOSS).loss


def _from_logprobs(inputs, logprobs):
    rest = {name: value for name, value in inputs.items() if name not in ("hidden", "weight", "targets")}
    return policy_loss(logprobs, **rest, **LOSS).loss


def two_operations(inputs):
    """token_logprobs of the trained rows, then policy_loss."""
    keep = inputs["mask"]
    scored = token_logprobs(inputs["hidden"], inputs["weight"], inputs["targets"], rows=keep).logprobs
    return _from_logprobs(inputs, torch.zeros_like(inputs["old_logprobs"]).masked_scatter(keep, scored))


def plain(inputs):
    logits = (inputs["hidden"] @ inputs["weight"].T).float()
    logprobs = torch.log_softmax(logits, -1).gather(1, inputs["targets"][:, None]).squeeze(1)
    return _from_logprobs(inputs, logprobs)


def trl_chunked(inputs):
    """TRL's chunked log-probs of the trained rows, as its asynchronous trainer calls them, then the same loss."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    keep = inputs["mask"]
    scored = ChunkedLogProbFunction.apply(
        inputs["hidden"][keep], inputs["weight"], None, inputs["targets"][keep], 1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",),
    )[0]  # fmt: skip
    return _from_logprobs(inputs, torch.zeros_like(inputs["old_logprobs"]).masked_scatter(keep, scored.float()))


def liger(inputs):
    """Liger's fused GRPO loss, one sequence a chunk as by default; compiled on a GPU as by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.04, compiled=GPU, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", use_ref_model=True
    )

    def by_sequence(name):
        return inputs[name].reshape(SEQUENCES, -1)

    hidden = inputs["hidden"].reshape(SEQUENCES, -1, inputs["hidden"].shape[1])
    return loss(
        hidden, inputs["weight"], by_sequence("targets"), by_sequence("mask").float(), inputs["advantages"],
        ref_per_token_logps=by_sequence("ref_logprobs"), old_per_token_logps=by_sequence("old_logprobs"),
    )[0]  # fmt: skip


PROVIDERS = {"hiexp": fused, "hiexp_two_operations": two_operations, "plain": plain}
PROVIDERS |= {"trl": trl_chunked} if importlib.util.find_spec("trl") else {}
PROVIDERS |= {"liger": liger} if importlib.util.find_spec("liger_kernel") else {}


def step(provider, inputs):
    """Loss and gradients; the gradients are dropped so that each round does the same work."""
    loss = PROVIDERS[provider](inputs)
    loss.backward()
    gradients = inputs["hidden"].grad, inputs["weight"].grad
    inputs["hidden"].grad = inputs["weight"].grad = None
    measure.synchronize(loss.device)
    return loss.detach(), gradients[0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-T{s[2]}-H{s[3]}-V{s[4]}-share{s[5]}")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_policy_loss(benchmark, provider, shape):
    inputs = make(*shape)
    rounds = 20 if shape[0] == "cuda" else 3
    loss, gradient = benchmark.pedantic(step, args=(provider, inputs), rounds=rounds, warmup_rounds=1, iterations=1)
    expected, exact = step("hiexp_two_operations", inputs)
    relative = 1e-4 if shape[1] == torch.float32 else 0.05
    torch.testing.assert_close(loss.float(), expected.float(), rtol=relative, atol=relative)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=relative * float(exact.abs().max()))
    operations = 6 * shape[2] * shape[3] * shape[4]
    benchmark.extra_info["TFLOP/s"] = operations / benchmark.stats.stats.median / 1e12
    benchmark.extra_info["peak MB"] = measure.peak_megabytes(
        step, (provider,), make, (*shape[:2], 16, 8, 16, 1.0), shape, inputs
    )
