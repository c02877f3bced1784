"""vLLM in this process: prefix caching, continuous batching, weights that a trainer replaces without a restart.

Turns are those of the transformers engine: stop strings are checked on tokens, samples come from the row's seed, and
log-probabilities are taken at the temperature before top_p (vllm_sampling.py). Tried with vLLM 0.32 on CPUs. The model
runs in the calling process, on one device; vLLM sets the global random state and, on CPUs, fixes torch's threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.agent.engine import EngineError, Generation, Sampling, check_prompts, check_turn, extend_rows
from hiexp.agent.stopping import StopRule

# Read by vLLM when it makes an engine: the model in this process, and the model runner whose logits processors
# vllm_sampling.py implements.
_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
# vLLM 0.32 looks into the attributes of every loaded module at its start and fails on this one, which numba loads and
# bm25s with it: its object `lib` answers every attribute, __dict__ too, with a function.
_UNREADABLE = "llvmlite.binding.ffi"
_CPU_BLOCK = 32  # tokens per block of the cache, what prefix caching can share; vLLM's CPU kernels want multiples of 32


class VllmEngine:
    """An :class:`hiexp.agent.engine.Engine` over ``vllm.LLM``.

    Args:
        model: folder or hub name of the model.
        tokenizer: its tokenizer, Hugging Face's interface.
        context_length: limit of prompt plus response in tokens; None takes the model's own.
        dtype: of weights and activations, ``"float32"`` or ``"bfloat16"``.
        cache_gib: memory for keys and values.
        random_weights: do not read the weights; a trainer gives them by :meth:`load_weights`.

    ``prompt_tokens`` and ``cached_tokens`` count what the turns' prompts held and how much of it was in the prefix
    cache.

    Raises:
        ImportError: vLLM is not installed.
        EngineError: vLLM could not start; its own message is quoted.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        *,
        context_length: int | None = None,
        dtype: str = "float32",
        cache_gib: float = 4.0,
        random_weights: bool = False,
    ) -> None:
        if not cache_gib > 0:
            raise ValueError(f"cache_gib: expected a positive number of GiB, got {cache_gib}")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._vllm = require("vllm", "vllm", "hiexp.agent.engine_vllm")
        self.tokenizer = tokenizer
        self.prompt_tokens = self.cached_tokens = 0
        self._turns: dict[str, _Turn] = {}
        self._count = 0
        self._rules: dict[tuple[str, ...], StopRule] = {}
        weights = "dummy" if random_weights else "auto"
        self._llm = self._start(model, context_length, dtype, int(cache_gib * 2**30), weights)
        self._engine = self._llm.llm_engine
        config = self._engine.model_config
        self.context_length, self._vocabulary = int(config.max_model_len), int(config.get_vocab_size())
        declared = (config.try_get_generation_config() or {}).get("eos_token_id")
        self._declared_eos = {declared} if isinstance(declared, int) else set(declared or ())

    def _start(self, model: str, context_length: int | None, dtype: str, cache_bytes: int, weights: str) -> Any:
        from hiexp.agent.vllm_sampling import DrawProcessor

        cpu = self._vllm.platforms.current_platform.is_cpu()
        # Compiling a model takes minutes on a CPU and gains little there.
        device = {"enforce_eager": True, "block_size": _CPU_BLOCK} if cpu else {"enable_sleep_mode": True}
        with _environment(_SETTINGS), _hidden(_UNREADABLE):
            try:
                return self._vllm.LLM(
                    model, skip_tokenizer_init=True, load_format=weights, dtype=dtype, max_model_len=context_length,
                    kv_cache_memory_bytes=cache_bytes, enable_prefix_caching=True, generation_config="vllm",
                    logprobs_mode="raw_logprobs", async_scheduling=False, logits_processors=[DrawProcessor], **device,
                )  # fmt: skip
            except Exception as error:
                raise EngineError(f"vLLM could not start {model} ({type(error).__name__}: {error})") from error

    def open(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawn: Sequence[int] | None = None
    ) -> VllmSession:
        """Start one row per prompt (token ids); row ``i`` samples with ``seeds[i]``, from its number ``drawn[i]`` on.

        Raises:
            ValueError: different numbers of prompts and seeds, an empty prompt, or one longer than the context.
        """
        check_prompts(prompts, seeds, self.context_length, drawn)
        return VllmSession(self, prompts, seeds, drawn)

    def stop_rule(self, stop: Sequence[str]) -> StopRule:
        """The compiled stop rule of these strings."""
        key = tuple(stop)
        if key not in self._rules:
            eos = self._declared_eos | ({self.tokenizer.eos_token_id} - {None})
            self._rules[key] = StopRule(self.tokenizer, key, eos, max(self._vocabulary, len(self.tokenizer)))
        return self._rules[key]

    def submit(self, turn: _Turn, prompt: list[int], limit: int, sampling: Sampling) -> None:
        """Queue a turn."""
        greedy = sampling.temperature == 0.0
        self._count += 1
        turn.request_id = f"turn-{self._count}"
        params = self._vllm.SamplingParams(
            temperature=sampling.temperature, max_tokens=limit, logprobs=0 if greedy else None, detokenize=False,
            ignore_eos=True, extra_args=None if turn.draws is None else turn.draws.extra_args(),
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )  # fmt: skip
        with _dying("queueing a turn"):
            self._engine.add_request(turn.request_id, {"prompt_token_ids": prompt}, params)
        self._turns[turn.request_id] = turn
        self.prompt_tokens += len(prompt)

    def step(self) -> None:
        """One forward pass over the turns under way, of all sessions; where it fails, all of them are given up."""
        try:
            with _dying("a step"):
                outputs = self._engine.step()
        except EngineError:
            # Sessions are of no use now; turns left behind would go on in the next step and keep new weights out.
            lost, self._turns = list(self._turns), {}
            with suppress(Exception):
                self._engine.abort_request(lost)
            raise
        ended = []
        for output in outputs:
            turn = self._turns.get(output.request_id)
            if turn is None:
                continue
            if not turn.token_ids:
                self.cached_tokens += output.num_cached_tokens or 0
            if turn.take(output.outputs[0]):
                ended.append(turn)
        self.drop(ended)

    def drop(self, turns: Iterable[_Turn]) -> None:
        """These turns are over, or given up."""
        ids = [turn.request_id for turn in turns if self._turns.pop(turn.request_id, None) is not None]
        if ids:
            with _dying("ending turns"):
                self._engine.abort_request(ids)

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of the tokens of each sequence, from its second one on.

        Raises:
            ValueError: a sequence shorter than 2 or as long as the context, or a turn under way.
        """
        for place, sequence in enumerate(sequences):
            if not 2 <= len(sequence) < self.context_length:
                raise ValueError(
                    f"sequences[{place}]: expected 2 to {self.context_length - 1} tokens, got {len(sequence)}"
                )
        self._check_idle()
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with _dying("scoring prompts"):
            prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            [float(given[token].logprob) for token, given in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Replace the weights by tensors named as transformers names them; what is cached is forgotten.

        Raises:
            ValueError: a turn is under way: half of it would come from either policy.
            EngineError: vLLM refuses them.
        """
        self._check_idle()
        with _dying("loading weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
            self.reset_cache()

    def _check_idle(self) -> None:
        if self._turns:
            raise ValueError(f"weights: expected no turn under way, got {len(self._turns)}; release the rows first")

    def reset_cache(self) -> None:
        """Forget keys and values of earlier turns."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache")

    def sleep(self) -> None:
        """Give the memory of weights and cache back until :meth:`wake_up`; on a CPU vLLM cannot, and nothing happens.

        The weights are not kept: load new ones after waking up.
        """
        if not self._vllm.platforms.current_platform.is_cpu():
            self._llm.sleep(level=2)

    def wake_up(self) -> None:
        """Take the memory back after :meth:`sleep`."""
        if not self._vllm.platforms.current_platform.is_cpu():
            self._llm.wake_up()


class _Turn:
    """One turn of one row while vLLM samples it. ``generation`` is set at its end."""

    def __init__(self, row: int, rule: StopRule, full: str, draws: Any) -> None:
        self.row, self.draws = row, draws
        self.request_id = ""
        self.token_ids: list[int] = []
        self.generation: Generation | None = None
        self._rule, self._full = rule, full  # full: finish reason where the limit is reached
        self._logprobs: list[float] = []

    def take(self, output: Any) -> bool:
        """Record what was sampled since the last step; whether the turn has ended."""
        for place, token in enumerate(output.token_ids):
            self.token_ids.append(int(token))
            if self.draws is None:
                self._logprobs.append(float(output.logprobs[place][token].logprob))
            code = int(self._rule.codes[token])
            reason: Any = self._rule.reason(code, self.token_ids) if code else None
            if reason is not None:
                return self._end(reason)
        return self._end(self._full) if output.finish_reason is not None else False

    def _end(self, reason: Any) -> bool:
        logprobs = self._logprobs
        if self.draws is not None:
            logprobs = [self.draws.logprobs[i] for i in range(len(self.token_ids))]
            self.draws.close()
        if not np.isfinite(logprobs).all():
            raise ValueError(
                f"model: log-probabilities of row {self.row} are not finite; the weights may have diverged"
            )
        self.generation = Generation(self.token_ids, logprobs, reason)
        return True


class VllmSession:
    """Rows of one batch, see :class:`hiexp.agent.engine.Session`. ``tokens[i]``: row ``i`` so far, prompt included."""

    def __init__(
        self,
        engine: VllmEngine,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        drawn: Sequence[int] | None = None,
    ) -> None:
        self.engine = engine
        self.tokens = [list(prompt) for prompt in prompts]
        self._seeds = [int(seed) for seed in seeds]
        self._sampled = [0] * len(self.tokens) if drawn is None else [int(count) for count in drawn]
        self._running: dict[int, _Turn] = {}
        self._released: set[int] = set()

    def start(
        self, rows: Sequence[int], max_new_tokens: Sequence[int], stop: Sequence[str], sampling: Sampling
    ) -> None:
        """Queue one turn for each of ``rows``; limits are per row, and the context ends a row with ``context``."""
        check_turn(rows, max_new_tokens, self._running.keys() | self._released, len(self.tokens))
        rule = self.engine.stop_rule(stop)
        for row, wanted in zip(rows, max_new_tokens, strict=True):
            room = self.engine.context_length - len(self.tokens[row])
            limit = min(max(wanted, 0), room)
            turn = _Turn(row, rule, "context" if room < wanted else "length", None)
            self._running[row] = turn
            if limit < 1:
                turn.generation = Generation([], [], "context" if room < wanted else "length")
                continue
            if sampling.temperature > 0:
                from hiexp.agent.vllm_sampling import Draws

                turn.draws = Draws(self._seeds[row], self._sampled[row], sampling.top_p)
            self.engine.submit(turn, list(self.tokens[row]), limit, sampling)

    def finished(self, block: bool = True) -> list[tuple[int, Generation]]:
        """Turns that ended since the last call; steps vLLM until there is one, or once where ``block`` is False."""
        ended = self._collect()
        while not ended and self._running:
            self.engine.step()
            ended = self._collect()
            if not block:
                break
        return ended

    def _collect(self) -> list[tuple[int, Generation]]:
        ended = [(row, turn.generation) for row, turn in self._running.items() if turn.generation is not None]
        for row, generation in ended:
            del self._running[row]
            self.tokens[row].extend(generation.token_ids)
            self._sampled[row] += len(generation.token_ids)
        return ended

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append inserted tokens to the idle ``rows``."""
        extend_rows(self.tokens, rows, token_ids, self.engine.context_length)

    def release(self, rows: Sequence[int]) -> None:
        """These rows speak no more; turns of theirs that are under way end here."""
        self._released.update(rows)
        turns = [self._running.pop(row) for row in rows if row in self._running]
        self.engine.drop(turns)
        for turn in turns:
            if turn.draws is not None:
                turn.draws.close()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Take a module out of ``sys.modules`` for the length of a block."""
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found


@contextmanager
def _dying(doing: str) -> Iterator[None]:
    """Turn vLLM's own exceptions into EngineError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM failed in {doing} ({type(error).__name__}: {error})") from error
