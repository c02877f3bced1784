"""Prompts in, replies out: what reflection needs of a language model, and the adapter from an engine to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hiexp.agent.engine import Engine, Sampling, generate

Complete = Callable[[list[str]], list[str]]


class EngineCompletion:
    """A :data:`Complete` over an engine; greedy unless ``sampling`` says otherwise, so that replies are reproducible.

    Args:
        engine: any engine of ``hiexp.agent``.
        max_new_tokens: limit of a reply.
        sampling: how to sample.
        seed: seed of the first prompt of a call, the others count up.
    """

    def __init__(
        self, engine: Engine, max_new_tokens: int = 512, sampling: Sampling | None = None, seed: int = 0
    ) -> None:
        if not 0 < max_new_tokens < engine.context_length:
            raise ValueError(
                f"max_new_tokens: expected 1 to {engine.context_length - 1} (context), got {max_new_tokens}"
            )
        self.engine, self.max_new_tokens, self.seed = engine, max_new_tokens, seed
        self.sampling = sampling or Sampling(temperature=0.0)

    def __call__(self, prompts: list[str]) -> list[str]:
        """One reply per prompt, special tokens left out.

        Raises:
            ValueError: a prompt that leaves no room for ``max_new_tokens`` in the context.
        """
        return complete_with_engine(self.engine, prompts, self.max_new_tokens, sampling=self.sampling, seed=self.seed)

    def fits(self, prompt: str) -> bool:
        """Whether ``prompt`` leaves room for the reply."""
        return len(_encode(self.engine.tokenizer, prompt)) + self.max_new_tokens <= self.engine.context_length


def complete_with_engine(
    engine: Engine, prompts: Sequence[str], max_new_tokens: int, *, sampling: Sampling | None = None, seed: int = 0
) -> list[str]:
    """Complete ``prompts`` (as user messages where the tokenizer has a chat template) in one batch.

    Raises:
        ValueError: a prompt that leaves no room for ``max_new_tokens`` in the context.
    """
    encoded = [_encode(engine.tokenizer, prompt) for prompt in prompts]
    for position, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > engine.context_length:
            raise ValueError(
                f"prompts[{position}]: {len(ids)} tokens and {max_new_tokens} for the reply do not fit into the "
                f"context of {engine.context_length} tokens"
            )
    if not encoded:
        return []
    session = engine.open(encoded, [seed + position for position in range(len(encoded))])
    rows = range(len(encoded))
    turns = generate(session, rows, [max_new_tokens] * len(rows), (), sampling or Sampling(temperature=0.0))
    return [str(engine.tokenizer.decode(turn.token_ids, skip_special_tokens=True)) for turn in turns]


def as_completion(model: Engine | Complete) -> Complete:
    """``model`` itself if it can be called with prompts, else an :class:`EngineCompletion` over it."""
    if callable(model):
        return model
    if hasattr(model, "open") and hasattr(model, "tokenizer"):
        return EngineCompletion(model)
    raise TypeError(f"expected an engine or a function from prompts to replies, got {type(model).__name__}")


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
