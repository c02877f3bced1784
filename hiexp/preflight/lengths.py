"""Do prompts, turns and documents fit the limits, the context and the micro-batch? Real questions are tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hiexp.agent.demonstration import with_demonstration
from hiexp.agent.protocol import get_dialect
from hiexp.preflight.check import Check

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.config import TrainConfig
    from hiexp.tasks.question import Question

SAMPLE = 500  # questions tokenised, spread over the file
_TAG_TOKENS = 16  # around documents and queries; a few per tag in every dialect


def length_checks(
    config: TrainConfig,
    tokenizer: Any,
    questions: Sequence[Question],
    snapshot: Snapshot | None,
    model_context: int | None,
) -> list[Check]:
    """Checks of the context, of the prompts, of one search, of all turns and of the micro-batch."""
    context = config.model.context_length or model_context
    checks = [_context(config, model_context)]
    if not questions:
        return checks
    places = np.unique(np.linspace(0, len(questions) - 1, SAMPLE).astype(int))
    prompts = prompt_lengths(config, tokenizer, [questions[place] for place in places])
    experience = _experience_tokens(config, tokenizer, snapshot)
    limit = min(config.rollout.max_total_tokens, context or config.rollout.max_total_tokens)
    checks.append(_prompt(config, prompts, limit))
    checks.append(_turns(config, int(prompts.max()) + experience, limit))
    checks.append(_microbatch(config))
    return checks


def prompt_lengths(config: TrainConfig, tokenizer: Any, questions: Sequence[Question]) -> Any:
    """Tokens (n,) of each question's prompt without experience, by the run's dialect and chat template."""
    dialect = get_dialect(config.rollout.dialect)
    if config.rollout.demonstration:
        dialect = with_demonstration(dialect)
    chat = dialect.chat and getattr(tokenizer, "chat_template", None) is not None
    lengths = []
    for question in questions:
        text = dialect.build_prompt(dialect.sanitize(question.text).strip())
        if chat:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        lengths.append(len(tokenizer(text, add_special_tokens=not chat)["input_ids"]))
    return np.array(lengths)


def _context(config: TrainConfig, model_context: int | None) -> Check:
    total, given = config.rollout.max_total_tokens, config.model.context_length
    if model_context is None:
        return Check("context", "ok", f"the model states none; rollouts end at {total:,} tokens")
    if given is not None and given > model_context:
        return Check(
            "context", "error", f"model.context_length {given:,} is beyond the model's own {model_context:,}",
            f"set model.context_length to at most {model_context}, or null",
        )  # fmt: skip
    context = given or model_context
    if total > context:
        return Check(
            "context", "warn", f"rollout.max_total_tokens {total:,} is beyond the context of {context:,}",
            f"set rollout.max_total_tokens to {context}: rollouts end there anyway",
        )  # fmt: skip
    return Check("context", "ok", f"{context:,} tokens, rollouts end at {total:,}")


def _experience_tokens(config: TrainConfig, tokenizer: Any, snapshot: Snapshot | None) -> int:
    """Most tokens that the entries in the prompt can take."""
    if snapshot is None or not config.experience.start_top_k:
        return 0
    levels = set(config.experience.start_levels)
    texts = [f"{entry.title} {entry.description}" for entry in snapshot.entries if entry.level in levels]
    lengths = sorted((len(tokenizer(text)["input_ids"]) for text in texts), reverse=True)
    return sum(lengths[: config.experience.start_top_k])


def _prompt(config: TrainConfig, prompts: Any, limit: int) -> Check:
    longest, middle = int(prompts.max()), int(np.median(prompts))
    text = f"{middle:,} tokens (median), {longest:,} (longest of {len(prompts)} tokenised)"
    if longest + 1 >= limit:
        return Check(
            "prompts", "error", f"{text}: no room in {limit:,} tokens",
            f"raise rollout.max_total_tokens above {longest + config.rollout.max_new_tokens}",
        )  # fmt: skip
    if longest + config.rollout.max_new_tokens > limit:
        return Check(
            "prompts", "warn", f"{text}: a turn of {config.rollout.max_new_tokens} does not fit into {limit:,}",
            f"raise rollout.max_total_tokens to at least {longest + config.rollout.max_new_tokens}",
        )  # fmt: skip
    return Check("prompts", "ok", text)


def _turns(config: TrainConfig, start: int, limit: int) -> Check:
    """Room for searches: turn, documents, ..., last turn, each at its own limit."""
    rollout = config.rollout
    search = 0 if config.tool.kind == "none" else rollout.max_document_tokens + _TAG_TOKENS
    turns = 1 if config.tool.kind == "none" else rollout.max_turns
    longest = start + turns * rollout.max_new_tokens + (turns - 1) * search
    one_search = start + 2 * rollout.max_new_tokens + search
    text = f"{turns} turns at their limits make {longest:,} tokens, experience included; limit {limit:,}"
    if turns > 1 and one_search > limit:
        return Check(
            "turns", "error", f"one search and an answer may take {one_search:,} tokens; limit {limit:,}",
            f"raise rollout.max_total_tokens to {longest}, or lower max_document_tokens or max_new_tokens",
        )  # fmt: skip
    if longest > limit:
        return Check(
            "turns", "warn", text, f"raise rollout.max_total_tokens to {longest}; else long rollouts end unanswered"
        )
    return Check("turns", "ok", text)


def _microbatch(config: TrainConfig) -> Check:
    budget, total = config.algorithm.tokens_per_microbatch, config.rollout.max_total_tokens
    text = f"{budget:,} tokens, the longest rollout {total:,}"
    if budget < total:
        return Check(
            "micro-batch", "warn", f"{text}: a long rollout is a micro-batch of its own, beyond the budget",
            f"plan memory for {total:,} tokens, or raise algorithm.tokens_per_microbatch",
        )  # fmt: skip
    return Check("micro-batch", "ok", text)
