"""An engine behind an OpenAI-compatible server that takes and gives token ids (vLLM: ``vllm serve MODEL``).

Prompts are sent as token ids and sampled ids come back (``return_token_ids``), so nothing is tokenised again. A row's
turn is one request; the server's prefix cache holds what the turns share. Log-probabilities are the server's: they are
those of the sampled tokens at temperature 1 unless the server was started with ``--logprobs-mode processed_logprobs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hiexp.agent.background import Background
from hiexp.agent.engine import EngineError, Generation, Sampling, check_prompts, check_turn, extend_rows
from hiexp.agent.http_rules import ServiceError, UnavailableError
from hiexp.agent.openai_server import OpenAIServer
from hiexp.agent.stopping import StopRule

_MOMENT_S = 0.02  # a round of work of an engine that works elsewhere


class OpenAIEngine:
    """An :class:`hiexp.agent.engine.Engine` over HTTP.

    Args:
        server: a server of text completions over token ids.
        tokenizer: the model's own tokenizer, Hugging Face's interface.
        context_length: limit of prompt plus response in tokens, as the server was started with.
    """

    def __init__(self, server: OpenAIServer, tokenizer: Any, context_length: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length: expected at least 2, got {context_length}")
        self.server, self.tokenizer, self.context_length = server, tokenizer, context_length
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


class OpenAISession:
    """Rows of one batch, see :class:`hiexp.agent.engine.Session`. ``tokens[i]``: row ``i`` so far, prompt included.

    Every turn is a request of its own, ``server.concurrency`` at once, and is handed out as soon as it is answered.
    """

    def __init__(self, engine: OpenAIEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        self.engine = engine
        self.tokens = [list(prompt) for prompt in prompts]
        self._seeds = [int(seed) for seed in seeds]
        self._busy: set[int] = set()  # rows that generate or are released
        self._requests: Background[Generation] = Background(engine.server.concurrency, "hiexp-openai")
        self._failed: BaseException | None = None

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        """Send one turn of each of ``rows``; limits are per row."""
        check_turn(rows, max_new_tokens, self._busy, len(self.tokens))
        rule = self.engine.stop_rule(stop)
        for row, wanted in zip(rows, max_new_tokens, strict=True):
            self._busy.add(row)
            self._requests.submit(row, partial(self._turn, row, wanted, rule, sampling))

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        """Turns that were answered; with ``block=False`` it waits for an answer for a moment only.

        Raises:
            EngineError: the server did not answer in all attempts. ServiceError: it refuses the request for good, or
                answers something else than its schema. Turns that were answered before come first.
        """
        if self._failed is not None:
            raise self._failed
        done: list[tuple[int, Generation]] = []
        for row, generation, error in self._requests.collect(None if block else _MOMENT_S):
            if generation is None:
                self._failed = EngineError(str(error)) if isinstance(error, UnavailableError) else error
                continue
            self._busy.discard(row)
            self.tokens[row].extend(generation.token_ids)
            done.append((row, generation))
        if self._failed is not None:
            self._requests.close()
            if not done:
                raise self._failed
        return done

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens to the idle ``rows``."""
        extend_rows(self.tokens, rows, token_ids, self.engine.context_length)

    def release(self, rows: Sequence[int]) -> None:
        """Forget the turns of ``rows``; requests that wait are not sent, answers on their way are dropped."""
        for row in rows:
            self._busy.add(row)
            self._requests.drop(row)

    def _turn(self, row: int, wanted: int, rule: StopRule, sampling: Sampling) -> Generation:
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
            raise ServiceError(
                f"{self.engine.server.url}/completions: expected token_ids and as many token_logprobs (vLLM 0.10.2 or "
                f"newer gives them), got {str({key: choice.get(key) for key in ('token_ids', 'logprobs')})[:200]}"
            )
        if len(token_ids) > limit:
            raise ServiceError(
                f"{self.engine.server.url}/completions: expected at most {limit} tokens, got {len(token_ids)}"
            )
        values = [float("nan") if value is None else float(value) for value in logprobs]
        if not np.isfinite(values).all():
            raise ServiceError(f"{self.engine.server.url}/completions: expected finite log-probabilities")
        return token_ids, values


def _seed(seed: int, length: int) -> int:
    """A seed of 31 bits, which every server takes."""
    return int(np.random.SeedSequence([seed, length]).generate_state(1)[0]) >> 1
