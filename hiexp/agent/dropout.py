"""Experience dropout: each retrieved entry is left out of a rollout with a known probability, alone.

Dropped entries leave their place empty, none moves up, and they are recorded beside those shown: inclusion indicators
and propensities are what the effect of a single entry is estimated from. The coin is a hash, so a rollout that is made
again sees the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hiexp.agent.record import Injection, Rollout

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Hit


def coin(rollout: Rollout, exp_id: str, turn: int) -> float:
    """Uniform in [0, 1): a hash of the rollout's seed and id (question, policy step, index), entry and turn."""
    key = f"{rollout.seed}/{rollout.rollout_id}/{exp_id}/{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64


def kept(rollout: Rollout, entries: Sequence[Hit], probability: float, turn: int) -> list[Hit]:
    """The entries that stay; the others go to ``rollout.dropped``. Turn 0 is the prompt."""
    place = len(rollout.token_ids)
    staying = []
    for hit in entries:
        entry = hit.experience
        if coin(rollout, entry.exp_id, turn) >= probability:
            staying.append(hit)
        else:
            shown = 1.0 - probability
            rollout.dropped.append(
                Injection(entry.exp_id, entry.rev, entry.level, float(hit.score), turn, place, place, shown)
            )
    return staying


def annealed(first: float, final: float | None, steps: int, step: int) -> float:
    """The probability at training step ``step``, counted from 1: from ``first`` to ``final`` over ``steps`` steps."""
    if final is None:
        return first
    return first + (final - first) * min(1.0, (step - 1) / steps)
