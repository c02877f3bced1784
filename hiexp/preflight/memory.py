"""Memory of a training run, estimated from the model's configuration; no weights are loaded.

With P parameters of b bytes, the AdamW of torch keeping its two moments in the type of the weights:

    static     weights P b + gradients P b + moments 2 P b, all / shards; reference P b (kl_coef > 0); with shards a
               whole copy P b that acts; with an adapter (LoRA of rank r) gradients and moments are of its r (in + out)
               numbers a layer alone, and the reference is the model without it
    rollouts   KV cache: rows * max_total_tokens * layers * 2 * kv_heads * head_dim * b
               sampling: rows * vocabulary * 24, rows = batch_rows or all rollouts of a step where these are fewer
    update     T = max(tokens_per_microbatch, max_total_tokens) tokens of saved activations, per layer and token
               norms 2 (4 H + 2 b H) + attention b (5 H + 4 K) + MLP 4 b I
               with H = hidden size, K = kv_heads * head_dim, I = inner size of the MLP
               or, with gradient checkpointing, b H per layer and one layer in full
               head: chunks of logits and the float32 gradient of the head's matrix, V H 4
    engine     with rollout.engine vllm, instead of the rollouts above: weights P b + vllm_cache_gib;
               with staleness k in this process: weights P b of the copy that samples
    copies     with staleness k: weights P b, k + 1 times, on their way to the engine
    peak       static + copies + max(rollouts + engine, update), or their sum where the rollouts go on while it learns
               (staleness) or the engine cannot give its memory back (vLLM on a CPU)

The terms are those of a Llama, Qwen2, Qwen3 or Mistral block as transformers computes it (RMSNorm in float32, SwiGLU,
SDPA). tests/preflight/test_memory.py holds them within a factor of 1.3 of the tensors that autograd really saves;
measured / estimated was 0.88 to 1.18 over four small models and two types.
Fragmentation, the CUDA context (0.5-1 GiB) and temporary buffers of single operations are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiexp.rl.config import TrainConfig

# float32 logits, probabilities, sorted copy and its int64 places, cumulative sum
_SAMPLING_BYTES = 24
# Logits that hiexp.linear_policy_loss keeps alive (its documentation)
_HEAD_CHUNK = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that the estimate needs. ``parameters`` counts tied weights once; ``query`` and ``kv`` are all heads."""

    parameters: int
    layers: int
    hidden: int
    query: int
    kv: int
    inner: int
    vocabulary: int
    context: int | None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on each process by part; ``peak`` is static + the larger of rollouts and update.

    ``engine``: of an engine that holds weights of its own. ``copies``: weights on their way to it. ``overlap``: what
    rollouts take is there while the policy learns, so that ``peak`` has both.
    """

    weights: int
    gradients: int
    moments: int
    reference: int
    kv_cache: int
    sampling: int
    activations: int
    head: int
    engine: int = 0
    copies: int = 0
    overlap: bool = False

    @property
    def static(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.moments + self.reference + self.copies

    @property
    def rollouts(self) -> int:
        """On top while the policy acts."""
        return self.kv_cache + self.sampling + self.engine

    @property
    def update(self) -> int:
        """On top while it learns."""
        return self.activations + self.head

    @property
    def peak(self) -> int:
        """Most at once."""
        return self.static + (self.rollouts + self.update if self.overlap else max(self.rollouts, self.update))


def model_shape(path: str) -> ModelShape:
    """The shape of the model at ``path``, from its configuration alone.

    Raises:
        OSError, ValueError, ImportError: nothing readable there; a configuration without the usual sizes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hiexp.rl.model import model_source

    config: Any = AutoConfig.from_pretrained(model_source(path))
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in sizes if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ValueError(f"model.path: the configuration of {path} has no {', '.join(missing)}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_dim,
        kv=heads * head_dim,
        inner=config.intermediate_size,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None),
    )


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Numbers in LoRA adapters of ``rank`` on all linear layers but the LM head (Hu et al. 2021)."""
    attention = 2 * (shape.hidden + shape.query) + 2 * (shape.hidden + shape.kv)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.inner))


def checkpoint_bytes(shape: ModelShape, config: TrainConfig) -> int:
    """One checkpoint on disk: what is trained with its two moments, and with ``lora_merged`` a whole model besides."""
    size = 4 if config.model.dtype == "float32" else 2
    rank = config.model.lora_rank
    if not rank:
        return 3 * shape.parameters * size
    return 3 * adapter_parameters(shape, rank) * size + (shape.parameters * size if config.model.lora_merged else 0)


def estimate(shape: ModelShape, config: TrainConfig, *, device: str, shards: int = 1) -> MemoryEstimate:
    """Memory of each process of the run.

    Args:
        device: ``cpu`` or ``cuda``.
        shards: processes over which weights, gradients and moments are spread, as FSDP2 does it; 1 where each process
            holds the whole model. What DeepSpeed holds besides stands in docs/distributed.md.
    """
    size = 4 if config.model.dtype == "float32" else 2
    weights = shape.parameters * size
    at_once = max(config.run.questions_per_step * config.rollout.group_size, config.evaluation.questions)
    vllm, ahead = config.rollout.engine == "vllm", config.rollout.staleness
    rows = 0 if config.rollout.server or vllm else min(config.rollout.batch_rows, at_once)
    cache = int(config.rollout.vllm_cache_gib * 2**30) if vllm else 0
    longest = config.rollout.max_total_tokens
    tokens = max(config.algorithm.tokens_per_microbatch, longest)
    rank = config.model.lora_rank
    trained = adapter_parameters(shape, rank) * size if rank else weights
    return MemoryEstimate(
        # Sharded training keeps whole copies on every process: one that acts (rl/policy.py), and the reference.
        weights=weights // shards + (weights if shards > 1 else 0),
        gradients=trained // shards,
        moments=2 * trained // shards,
        reference=weights if config.algorithm.kl_coef > 0 and not rank else 0,
        kv_cache=rows * longest * shape.layers * 2 * shape.kv * size,
        sampling=rows * shape.vocabulary * _SAMPLING_BYTES,
        activations=activation_bytes(shape, tokens, size, checkpointing=config.model.gradient_checkpointing),
        engine=weights + cache if vllm or (ahead and rows) else 0,
        copies=weights * (ahead + 1) if ahead else 0,
        overlap=ahead > 0 or (vllm and device == "cpu"),
        head=min(_HEAD_CHUNK[device], tokens * shape.vocabulary * 4) + shape.vocabulary * shape.hidden * 4,
    )


def activation_bytes(shape: ModelShape, tokens: int, size: int, *, checkpointing: bool) -> int:
    """What autograd keeps of the layers for ``tokens`` tokens with values of ``size`` bytes."""
    norms = 2 * (4 * shape.hidden + 2 * size * shape.hidden)
    attention = size * (5 * shape.hidden + 4 * shape.kv)
    layer = tokens * (norms + attention + 4 * size * shape.inner)
    if checkpointing:
        return shape.layers * tokens * size * shape.hidden + layer
    return shape.layers * layer
