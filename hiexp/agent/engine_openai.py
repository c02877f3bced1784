"""An engine behind an OpenAI-compatible server that takes and gives token ids (vLLM: ``vllm serve MODEL``).

Prompts are sent as token ids and sampled ids come back (``return_token_ids``), so nothing is tokenised again. A row's
turn is one request; the server's prefix cache holds what the turns share. Log-probabilities are the server's: they are
those of the sampled tokens at temperature 1 unless the server was started with ``--logprobs-mode processed_logprobs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hiexp.agent.engine import Generation, Sampling, check_prompts
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.openai_server import OpenAIServer
from hiexp.agent.remote_session import RemoteSession
from hiexp.agent.stopping import StopRule


class OpenAIEngine:
    """An :class:`hiexp.agent.engine.Engine` over HTTP.

    Args:
        server: a server of text completions over token ids.
        tokenizer: the model's own tokenizer, Hugging Face's interface.
        context_length: limit of prompt plus response in tokens, as the server was started with.
        vocabulary: how many token ids the model knows, where these are more than the tokenizer's (padding).
    """

    def __init__(self, server: OpenAIServer, tokenizer: Any, context_length: int, vocabulary: int = 0) -> None:
        if context_length < 2:
            raise ValueError(f"context_length: expected at least 2, got {context_length}")
        self.server, self.tokenizer, self.context_length = server, tokenizer, context_length
        self.vocabulary = max(vocabulary, len(tokenizer))
        self._rules: dict[tuple[str, ...], StopRule] = {}

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> OpenAISession:
        """Start one row per prompt (token ids); row ``i`` samples with ``seeds[i]``.

        A turn's seed follows from the row's seed and length, so ``drawn`` is not needed to go on as before.

        Raises:
            ValueError: different numbers of prompts and seeds, an empty prompt, or one longer than the context.
        """
        check_prompts(prompts, seeds, self.context_length, drawn)
        return OpenAISession(self, prompts, seeds)

    def stop_rule(self, stop: Sequence[str]) -> StopRule:
        """The compiled stop rule of these strings."""
        key = tuple(stop)
        if key not in self._rules:
            eos = self.tokenizer.eos_token_id
            self._rules[key] = StopRule(self.tokenizer, key, [] if eos is None else [eos], len(self.tokenizer))
        return self._rules[key]


class OpenAISession(RemoteSession):
    """Rows of one batch; see :class:`hiexp.agent.remote_session.RemoteSession`."""

    def __init__(self, engine: OpenAIEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        super().__init__(prompts, engine.context_length, engine.server.concurrency)
        self.engine = engine
        self._seeds = [int(seed) for seed in seeds]

    def speaker(self, stop: Sequence[str], sampling: Sampling) -> Callable[[int, int], Generation]:
        """One request a turn, with the stop rule of ``stop`` compiled once."""
        return partial(self._turn, self.engine.stop_rule(stop), sampling)

    def _turn(self, rule: StopRule, sampling: Sampling, row: int, wanted: int) -> Generation:
        tokens = self.tokens[row]
        room = self.engine.context_length - len(tokens)
        limit = min(max(wanted, 0), room)
        if limit < 1:
            return Generation([], [], "context" if room < wanted else "length")
        body = {
            "prompt": tokens, "max_tokens": limit, "temperature": sampling.temperature, "top_p": sampling.top_p,
            # The length tells the turns of a row apart, whose seed is one number.
            "seed": _seed(self._seeds[row], len(tokens)), "stop": list(rule.strings), "logprobs": 0,
            "include_stop_str_in_output": True, "skip_special_tokens": False, "return_token_ids": True,
        }  # fmt: skip
        choice = self.engine.server.post("/completions", body)
        token_ids, logprobs = self._sampled(choice, limit)
        reason = str(choice.get("finish_reason"))
        # Stop strings that stand for a group are not the server's; the rule finds the token where the turn ended.
        for end, token in enumerate(token_ids, start=1):
            code = int(rule.codes[token]) if token < len(rule.codes) else 0
            ended = rule.reason(code, token_ids[:end]) if code else None
            if ended is not None:
                return Generation(token_ids[:end], logprobs[:end], ended)
        if reason == "length":
            return Generation(token_ids, logprobs, "context" if room < wanted else "length")
        return Generation(token_ids, logprobs, "eos")

    def _sampled(self, choice: dict[str, Any], limit: int) -> tuple[list[int], list[float]]:
        token_ids, given = choice.get("token_ids"), choice.get("logprobs")
        logprobs = given.get("token_logprobs") if isinstance(given, dict) else None
        if not isinstance(token_ids, list) or not isinstance(logprobs, list) or len(logprobs) != len(token_ids):
            found = {key: choice.get(key) for key in ("token_ids", "logprobs")}
            raise self._wrong("token_ids and as many token_logprobs (vLLM 0.10.2 or newer gives them)", found)
        if len(token_ids) > limit:
            raise self._wrong(f"at most {limit} tokens", len(token_ids))
        size = self.engine.vocabulary
        for token in token_ids:
            if type(token) is not int or not 0 <= token < size:
                raise self._wrong(f"token_ids from 0 to {size - 1} (is it the model of this tokenizer?)", token)
        for value in logprobs:
            if type(value) not in (int, float) or not abs(value) < math.inf:
                raise self._wrong("finite log-probabilities as numbers", value)
        return token_ids, [float(value) for value in logprobs]

    def _wrong(self, expected: str, got: Any) -> ServiceError:
        server = self.engine.server
        return ServiceError(f"{server.url}/completions: expected {expected}, got {server.shown(got)}")


def _seed(seed: int, length: int) -> int:
    """A seed of 31 bits, which every server takes."""
    return int(np.random.SeedSequence([seed, length]).generate_state(1)[0]) >> 1
