"""A transformer of about a million parameters that learns to search in a minute on a CPU, as a Hugging Face model.

Why: the quickstart runs the real agent, engine and trainer, so its policy has to be a real causal language model:
``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained`` work. Pre-norm transformer (RMSNorm, rotary positions,
SwiGLU, tied embedding) with one addition: each position also sees its two predecessors through a *token shift*,
``x(t) = e(t) + W1 e(t-1) + W2 e(t-2)`` (RWKV, arXiv 2305.13048, generalised to two steps). Copying "the word after this
word" then needs one attention layer instead of two, which is what makes a one-minute warm start possible.

Predecessors are the last *real* tokens: slots that ``attention_mask`` marks as holes are skipped. float32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"


class TinyConfig(PreTrainedConfig):
    """Sizes of a :class:`TinyPolicy`; the defaults make about 0.75 million parameters."""

    model_type = "hiexp_tiny"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        max_position_embeddings: int = 512,
        initializer_range: float = 0.02,
        pad_token_id: int = 0,
        bos_token_id: int = 2,
        eos_token_id: int = 3,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)


def _predecessors(ids: Tensor, real: Tensor, n: int, padding: int) -> tuple[Tensor, Tensor]:
    """The two real tokens before each of the last ``n`` positions of ``ids`` (B, S): t-1 (B, n) and t-2 (B, n).

    ``real`` (B, S) bool marks tokens that are no holes; before the first one stands ``padding``.
    """
    n_rows, slots = ids.shape
    rank = real.long().cumsum(1)  # number of real tokens up to and including t
    # Row-wise list of real tokens behind two of padding; holes go to a waste column at the end.
    dense = ids.new_full((n_rows, slots + 3), padding)
    dense.scatter_(1, torch.where(real, rank + 1, slots + 2), ids)
    rank = rank[:, slots - n :]
    return dense.gather(1, rank), dense.gather(1, (rank - 1).clamp_min(0))


class _Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm, each added to the residual stream."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        d, self.heads, self.layer = config.hidden_size, config.num_attention_heads, layer
        self.attention_norm = nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.RMSNorm(d, eps=1e-6)
        self.gate_up = nn.Linear(d, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        n_rows, n, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n_rows, n, 3 * self.heads, -1)
        qk, v = qkv.split([2 * self.heads, self.heads], dim=2)
        q, k = _rotate(qk, rotation).transpose(1, 2).split(self.heads, dim=1)  # (B, heads, q, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(n_rows, n, d))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on ``x`` (B, q, heads, D); ``rotation`` (B, q, 1, D/2) complex64."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class TinyPreTrainedModel(PreTrainedModel):
    """What backbone and policy share: configuration and initialisation (linear and embedding ~ N(0, 0.02))."""

    config_class = TinyConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class TinyModel(TinyPreTrainedModel):
    """Backbone: token ids to hidden states."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.shift = nn.ModuleList([nn.Linear(d, d, bias=False) for _ in range(2)])
        self.layers = nn.ModuleList([_Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, q, H) of ``input_ids`` (B, q) int64.

        Args:
            attention_mask: (B, past + q), 0 for holes; all ones if None.
            position_ids: (B, q); the number of real tokens before each if None.
            past_key_values: any transformers cache, extended in place; the token ids, which the token shift needs, are
                kept in it as one layer more.
            use_cache: make a cache if there is none.
        """
        n_rows, n = input_ids.shape
        cache = past_key_values if past_key_values is not None or not use_cache else DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        visible = input_ids.new_ones(n_rows, past + n) if attention_mask is None else attention_mask
        visible = visible.bool()
        if position_ids is None:
            position_ids = (visible.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        ids = input_ids
        if cache is not None:
            block = input_ids[:, None, :, None]  # (B, 1, q, 1)
            ids = cache.update(block, block[..., :0], len(self.layers))[0][:, 0, :, 0]
        previous, second = _predecessors(ids, visible, n, self.config.pad_token_id)
        x = self.embed_tokens(input_ids)
        x = x + self.shift[0](self.embed_tokens(previous)) + self.shift[1](self.embed_tokens(second))
        rotation, mask = self._rotation(position_ids), _attention_mask(visible, n)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)

    def _rotation(self, position_ids: Tensor) -> Tensor:
        """(B, q, 1, D/2) complex64, unit numbers."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        frequencies = 10_000.0 ** (-torch.arange(half, device=position_ids.device) / half)
        angles = position_ids[:, :, None, None].float() * frequencies
        return torch.polar(torch.ones_like(angles), angles)


def _attention_mask(visible: Tensor, n: int) -> Tensor:
    """(B, 1, n, slots) bool: real slots up to the query's own, which even a hole may see (an empty softmax is NaN)."""
    slots = visible.shape[1]
    if n == 1:
        mask = visible.clone()
        mask[:, -1] = True
        return mask[:, None, None, :]
    age = torch.arange(slots - n, slots, device=visible.device)[:, None] - torch.arange(slots, device=visible.device)
    return ((visible[:, None, :] & (age > 0)) | (age == 0))[:, None]


class TinyPolicy(TinyPreTrainedModel):
    """The causal language model; its head is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = TinyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, q, V), or of the last ``logits_to_keep`` positions; arguments as in :meth:`TinyModel.forward`."""
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        hidden = output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output.last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=output.past_key_values)


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of white-space separated words; ids follow ``vocabulary``, behind four special tokens.

    Raises:
        ValueError: a word holds white space, comes twice or is one of the special tokens.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [PAD, UNK, BOS, EOS, *vocabulary]
    bad = [word for word in vocabulary if not word or len(word.split()) != 1]
    if bad or len(set(words)) != len(words):
        raise ValueError(f"vocabulary: expected different single words, got {bad or 'a repeated word'}")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


AutoConfig.register(TinyConfig.model_type, TinyConfig)
AutoModelForCausalLM.register(TinyConfig, TinyPolicy)
