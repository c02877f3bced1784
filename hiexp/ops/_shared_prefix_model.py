"""Hidden states of packed groups from a Hugging Face decoder: its own layers, with our attention for the one call.

transformers looks its attention function up by a name in the config, at every layer call. The name is switched during
the forward pass and, with gradient checkpointing, again around each layer's recomputation; who sees whom travels as a
keyword argument through the model. A forward pass of another thread meanwhile lacks that argument and gets SDPA.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hiexp.ops._shared_prefix_attention import shared_prefix_attention
from hiexp.ops._shared_prefix_layout import PrefixLayout

NAME = "hiexp_shared_prefix"
FAMILIES = ("llama", "qwen2", "qwen3")
# Their rotation of a token depends on its position alone; "dynamic" and "longrope" look at the longest sequence too.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def packed_hidden_states(
    model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: PrefixLayout, impl: str | None = None
) -> torch.Tensor:
    """Last hidden states ``(T, H)`` of packed tokens (1, T), after the final norm.

    Raises:
        ValueError: see :func:`check_model`. That the sequences fit the model is up to :func:`check_length`.
    """
    causal = check_model(model)
    # A mask of four dimensions is passed on as it is, so no (T, T) mask is built; our attention reads the layout.
    no_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)
    with _attention_switched(causal.base_model):
        output = causal.base_model(
            input_ids=input_ids, attention_mask=no_mask, position_ids=position_ids, use_cache=False,
            shared_prefix=(layout, impl),
        )  # fmt: skip
    return output.last_hidden_state[0]


def why_unsupported(model: Any) -> str | None:
    """What of ``model`` cannot be scored behind a shared prefix, None if nothing."""
    causal = _without_adapter(model)
    config: Any = getattr(causal, "config", None)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if getattr(config, "model_type", None) not in FAMILIES or head is None or causal.base_model is causal:
        return f"expected a causal language model of one of the families {', '.join(FAMILIES)}, got {_name(model)}"
    if type(head) is not torch.nn.Linear:
        return f"expected an LM head that is a plain linear layer, got {type(head).__name__} (an adapter on the head?)"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"expected rotary positions of type {', '.join(ROPE_TYPES)}, got {rope['rope_type']!r}"
    if causal.training and getattr(config, "attention_dropout", 0.0):
        return f"expected no attention dropout in training mode, got attention_dropout={config.attention_dropout}"
    if not all(getattr(layer.self_attn, "is_causal", False) for layer in causal.base_model.layers):
        return "expected causal attention in every layer, got one with is_causal=False"
    return None


def check_model(model: Any) -> Any:
    """The transformers model inside ``model`` (out of its PEFT wrapper, if any), ready for packed groups.

    Raises:
        ValueError: see :func:`why_unsupported`.
    """
    reason = why_unsupported(model)
    if reason is not None:
        raise ValueError(f"model: {reason}")
    return _without_adapter(model)


def _without_adapter(model: Any) -> Any:
    """LoRA layers sit inside the base model, so the base model alone computes with them. A learned prompt would not."""
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "get_base_model"):
        return model
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        return model
    return model.get_base_model()


def _name(model: Any) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {kind!r})" if kind is not None else "")


def check_length(config: Any, longest: int) -> None:
    """Raise ValueError where prefix + response, ``longest`` tokens, exceed the positions or the sliding window."""
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"prefix_ids, response_ids: expected at most {config.max_position_embeddings} tokens in prefix + response "
            f"(max_position_embeddings), got {longest}"
        )
    window: Any = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and longest > window:
        raise ValueError(
            f"prefix_ids, response_ids: expected at most {window} tokens in prefix + response (sliding_window), "
            f"got {longest}"
        )


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float | None = None,
    shared_prefix: Any = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function transformers calls: query (1, Hq, T, D), key, value (1, Hkv, T, D) -> (1, T, Hq, D)."""
    if shared_prefix is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    layout, impl = shared_prefix
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    # Rotary factors in another precision may have widened queries and keys.
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prefix_attention(q, k, v, layout, scale, impl)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

_lock = threading.Lock()
_switched: dict[int, tuple[int, list[Callable[[], None]]]] = {}  # id(body) -> users, what restores it


@contextlib.contextmanager
def _attention_switched(body: Any) -> Iterator[None]:
    """``body`` with our attention; the last of several overlapping users restores what the first one found."""
    with _lock:
        users, restore = _switched.get(id(body), (0, []))
        if users == 0:
            _switch(body, restore)
        _switched[id(body)] = (users + 1, restore)
    try:
        yield
    finally:
        with _lock:
            users, restore = _switched.pop(id(body))
            if users == 1:
                for undo in restore:
                    undo()
            else:
                _switched[id(body)] = (users - 1, restore)


def _switch(body: Any, restore: list[Callable[[], None]]) -> None:
    def replace(owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        restore.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    for config in {id(layer.self_attn.config): layer.self_attn.config for layer in body.layers}.values():
        replace(config, "_attn_implementation", NAME)
    for layer in body.layers:
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            replace(layer, "_gradient_checkpointing_func", _switching(body, layer._gradient_checkpointing_func))


def _switching(body: Any, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint`` whose function also runs with our attention when backward calls it again."""

    def checkpoint_switched(function: Callable[..., Any], *inputs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with _attention_switched(body):
                return function(*inputs)

        return checkpoint(run, *inputs)

    return checkpoint_switched
