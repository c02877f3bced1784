"""Log-probs of G responses behind one prefix, from a Hugging Face decoder that computes the prefix once.

Scored alone, G responses of R tokens behind a prefix of P cost G (P + R) tokens forward and backward; packed they cost
P + G R, with the same log-probs and gradients. _shared_prefix_layout.py packs, _shared_prefix_attention.py attends,
_shared_prefix_model.py runs the model; only hidden states that predict a scored token reach the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp._extras import require
from hiexp.ops._checks import check_choice, check_flag, check_number, describe, is_tensor
from hiexp.ops.token_logprobs import token_logprobs

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.score_group")
require("transformers", "train", "hiexp.score_group")

from hiexp.ops._shared_prefix_attention import IMPLEMENTATIONS  # noqa: E402 - needs torch
from hiexp.ops._shared_prefix_layout import pack_groups  # noqa: E402
from hiexp.ops._shared_prefix_model import check_length, check_model, packed_hidden_states  # noqa: E402


@dataclass(frozen=True)
class GroupScores:
    """Scored tokens of all responses, N of them, packed in the order of the responses; tensors are differentiable.

    Attributes:
        logprobs: (N,) log-probability of each scored token in nats, float32 (float64 for a float64 model).
        entropy: (N,) entropy of the distribution it was drawn from, None unless asked for.
        cu_seqlens: (G + 1,) int64, tokens of response g are ``[cu_seqlens[g], cu_seqlens[g + 1])``.
        hidden: (N, H) last hidden states that predict the tokens, None unless asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    cu_seqlens: torch.Tensor
    hidden: torch.Tensor | None


def score_group(
    model: Any,
    prefix_ids: Any,
    response_ids: Sequence[Any],
    *,
    mask: Sequence[Any] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    return_hidden: bool = False,
    impl: str | None = None,
) -> GroupScores:
    """Score G responses to one prefix; the prefix is computed once, forward and backward.

    Args:
        model: causal language model of transformers of the Llama, Qwen2 or Qwen3 family, with LoRA layers or gradient
            checkpointing if you like. Runs in the mode it is in, and is left as it was.
        prefix_ids: (P,) integer token ids, P >= 1: a list, an array or a tensor.
        response_ids: G sequences of integer token ids (R_g,), ragged; R_g may be 0.
        mask: G sequences (R_g,) of bool or 0/1: which tokens to score; None scores all. Masked tokens (a retrieved
            document, say) are context for what follows, those behind the last scored token are not computed.
        temperature: logits are divided by this positive number.
        entropy: also compute the entropy, with its gradient.
        return_hidden: also return the hidden states, e.g. for :func:`hiexp.linear_policy_loss`.
        impl: the attention: ``"flash"`` (flash kernels of torch: any dtype on a CPU, float16 or bfloat16 on a GPU),
            ``"torch"``; None takes ``"flash"`` wherever it works.

    Log-probs and gradients are those of scoring every response alone, up to the order of summation. Dropout, where the
    model is in training mode and has any, is drawn once for the prefix instead of G times.

    Raises:
        TypeError, ValueError: a model of another kind (the message names what is supported), ids that are not 1-D,
            not integers or outside the vocabulary, more tokens than the model has positions, a mask of other lengths.
    """
    causal = check_model(model)
    check_flag("entropy", entropy)
    vocabulary = causal.get_input_embeddings().weight
    temperature = check_number("temperature", temperature, 0.0, exclusive=True)
    if impl is not None:
        check_choice("impl", impl, IMPLEMENTATIONS)
    prefix = _token_ids("prefix_ids", prefix_ids, vocabulary)
    if len(prefix) == 0:
        raise ValueError("prefix_ids: expected at least one token, the first token of a response needs one before it")
    if isinstance(response_ids, str) or not isinstance(response_ids, Sequence) or len(response_ids) == 0:
        raise ValueError(f"response_ids: expected a list of at least one response, got {describe(response_ids)}")
    responses = [_token_ids(f"response_ids[{g}]", ids, vocabulary) for g, ids in enumerate(response_ids)]
    scored = _scored_tokens(mask, responses)
    hidden = _hidden_states(model, prefix, responses, scored, impl)  # (N, H)
    targets = torch.cat([ids[tokens] for ids, tokens in zip(responses, scored, strict=True)])
    head = causal.get_output_embeddings()
    result = token_logprobs(hidden, head.weight, targets, bias=head.bias, temperature=temperature, entropy=entropy)
    cu_seqlens = torch.tensor([*accumulate(map(len, scored), initial=0)], device=prefix.device)
    return GroupScores(result.logprobs, result.entropy, cu_seqlens, hidden if return_hidden else None)


def _hidden_states(
    model: Any, prefix: torch.Tensor, responses: list[torch.Tensor], scored: list[torch.Tensor], impl: str | None
) -> torch.Tensor:
    """(N, H) hidden states of the tokens before the scored ones."""
    # The last scored token of a response is a target only, never an input.
    lengths = [int(tokens[-1]) if len(tokens) else 0 for tokens in scored]
    packed = pack_groups([(prefix, [ids[:length] for ids, length in zip(responses, lengths, strict=True)])])
    check_length(check_model(model).config, packed.layout.longest)
    rows = torch.cat([packed.rows(0, g, len(prefix) + tokens - 1) for g, tokens in enumerate(scored)])
    return packed_hidden_states(model, packed.input_ids, packed.position_ids, packed.layout, impl)[rows]


def _token_ids(name: str, value: Any, vocabulary: torch.Tensor) -> torch.Tensor:
    """``value`` as int64 (n,) where the model is."""
    if not is_tensor(value):
        array = np.asarray(value)
        if array.size == 0 and array.dtype.kind == "f":
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integer token ids, got {describe(array)}")
        value = torch.from_numpy(array.astype(np.int64))
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {describe(value)}")
    if value.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got {describe(value)}")
    outside = (value < 0) | (value >= len(vocabulary))
    if bool(outside.any()):
        position = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"{name}[{position}]: expected a token id in 0..{len(vocabulary) - 1}, got {int(value[position])}"
        )
    return value.to(vocabulary.device, torch.int64)


def _scored_tokens(mask: Any, responses: list[torch.Tensor]) -> list[torch.Tensor]:
    """Indices of the scored tokens of each response."""
    if mask is None:
        return [torch.arange(len(ids), device=ids.device) for ids in responses]
    if not isinstance(mask, Sequence) or len(mask) != len(responses):
        got = f"{len(mask)} masks" if isinstance(mask, Sequence) else describe(mask)
        raise ValueError(f"mask: expected a list of {len(responses)} masks, one a response, got {got}")
    scored = []
    for g, (row, ids) in enumerate(zip(mask, responses, strict=True)):
        flags = torch.as_tensor(row)
        if flags.shape != ids.shape:
            raise ValueError(f"mask[{g}]: expected shape {tuple(ids.shape)} (response {g}), got {tuple(flags.shape)}")
        if (len(flags) and flags.is_floating_point()) or bool(((flags != 0) & (flags != 1)).any()):
            raise ValueError(f"mask[{g}]: expected bool or 0 and 1, got {describe(flags)}")
        scored.append(flags.to(ids.device).nonzero().squeeze(1))
    return scored
