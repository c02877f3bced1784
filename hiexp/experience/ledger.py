"""What distillation cost: lessons, refusals, tokens and seconds per reflector, kept in the HEK itself.

Counts grow batch by batch in the transaction that stores the batch, so a killed distillation has counted what it paid
for. A reflector is named as on the command line (``extractive``, ``llm:MODEL``, ``openai:MODEL``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiexp.experience.store import HEK

_KEY = "distillations"


@dataclass(frozen=True, slots=True)
class Tally:
    """What one reflector has done for one HEK.

    Attributes:
        lessons: stored for the first time. duplicates: lessons equal in content to a stored one, merged into it.
        rejected: replies that could not be used.
        requests, prompt_tokens, completion_tokens: of the language model, retries included; 0 without one.
        seconds: wall time of reflection.
        cost: at the prices given then, in their currency; 0 where none were given.
    """

    lessons: int = 0
    duplicates: int = 0
    rejected: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        mine, theirs = asdict(self), asdict(other)
        return Tally(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost: of the prompt, and of the reply."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not (0 <= self.prompt < float("inf") and 0 <= self.completion < float("inf")):
            raise ValueError(f"--price: expected two prices >= 0, got {self.prompt} and {self.completion}")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost of so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Meter:
    """Reads what a language model has used since the last reading.

    Args:
        model: has a mapping ``usage`` with ``requests``, ``prompt_tokens`` and ``completion_tokens``; anything else,
            None included, counts as nothing.
        prices: what its tokens cost.
    """

    def __init__(self, model: Any, prices: Prices | None = None) -> None:
        self._model, self._prices = model, prices
        self._last, self._time = self._usage(), time.perf_counter()

    def read(self) -> Tally:
        """Requests, tokens, seconds and cost since the last reading, or since the meter was made."""
        now, moment = self._usage(), time.perf_counter()
        used = {name: now[name] - self._last[name] for name in now}
        seconds = moment - self._time
        self._last, self._time = now, moment
        tokens = used["prompt_tokens"], used["completion_tokens"]
        return Tally(**used, seconds=seconds, cost=0.0 if self._prices is None else self._prices.of(*tokens))

    def _usage(self) -> dict[str, int]:
        usage: Mapping[str, int] = getattr(self._model, "usage", {})
        return {name: int(usage.get(name, 0)) for name in ("requests", "prompt_tokens", "completion_tokens")}


def read_ledger(hek: HEK) -> dict[str, Tally]:
    """Reflector -> what it has done for this HEK; empty for one made before there was a ledger."""
    known = {field.name for field in fields(Tally)}
    stored: dict[str, dict[str, Any]] = json.loads(hek.database.find_meta(_KEY) or "{}")
    return {
        name: Tally(**{key: value for key, value in tally.items() if key in known}) for name, tally in stored.items()
    }


def add_to_ledger(hek: HEK, reflector: str, tally: Tally) -> None:
    """Add ``tally`` to what ``reflector`` has done; within the transaction that stores what it counts."""
    ledger = read_ledger(hek)
    ledger[reflector] = ledger.get(reflector, Tally()).plus(tally)
    text = json.dumps({name: asdict(one) for name, one in sorted(ledger.items())})
    with hek.transaction():
        hek.database.set_meta(_KEY, text)
