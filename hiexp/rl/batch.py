"""Rollouts as micro-batches with a token budget, and the rows of the hidden states that are trained.

Padded: right padding, position ids from 0; causal attention then never sees padding. Packed: rollouts that begin with
the same tokens (question, experience) stand behind one copy of them, see ops/_shared_prefix_layout.py; no padding. The
token at position t is predicted by the hidden state at t - 1, so the trained rows are those before the sampled tokens
(loss_mask 1); retrieved documents, injected experiences and templates never reach the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from hiexp.agent.record import Rollout
from hiexp.ops._shared_prefix_layout import PrefixLayout, pack_groups
from hiexp.rl.distributed import Ranks, balance


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rollouts of a step as tensors. B rollouts, N trained tokens, packed in rollout order.

    Attributes:
        indices: which rollouts, B integers.
        input_ids, position_ids: (B, T) int64 with padded length T; (1, T) with all T tokens where packed.
        attention_mask: (B, T) int64, 1 on real tokens; None where packed.
        rows: (N,) int64 into the flattened hidden states: the position before each trained token.
        targets: (N,) int64, the trained tokens.
        cu_seqlens: (B + 1,) int64, trained tokens of rollout b are [cu_seqlens[b], cu_seqlens[b + 1]).
        layout: who sees whom where packed, else None.
        filler: computed so that every rank has as many batches; its results are thrown away.
    """

    indices: list[int]
    input_ids: Any
    attention_mask: Any
    position_ids: Any
    rows: Any
    targets: Any
    cu_seqlens: Any
    layout: PrefixLayout | None = None
    filler: bool = False


def trainable(rollout: Rollout) -> bool:
    """Whether the rollout has a sampled token with something before it."""
    return any(rollout.loss_mask[1:])


def microbatches(
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    token_budget: int,
    pad_id: int,
    device: Any = "cpu",
    *,
    packed: bool = False,
    ranks: Ranks | None = None,
) -> list[MicroBatch]:
    """The rollouts ``indices`` in batches of at most ``token_budget`` tokens, padding included, or of one rollout.

    Padded, the longest come first, so that similar lengths share a batch; ``packed``, those that begin alike do. With
    several ``ranks`` this rank's batches of a plan that all make alike: equally many on every rank, of about equal cost
    (the last ones may be fillers), because their collectives have to meet.

    Raises:
        ValueError: a rollout without trained tokens, or with lists of different lengths.
    """
    ranks = Ranks() if ranks is None else ranks
    plan: Callable[..., Sequence[_Padded | _Packed]] = _plan_packed if packed else _plan_padded
    batches = plan(rollouts, indices, token_budget)
    if ranks.size > 1 and batches:
        # So that no rank is left without work, the budget of a round is shared by all.
        total = sum(batch.tokens for batch in batches)
        rounds = -(-total // (ranks.size * token_budget))
        batches = plan(rollouts, indices, -(-total // (ranks.size * rounds)))
    shares = balance([batch.tokens for batch in batches], ranks.size)
    mine = [batches[b].collate(rollouts, pad_id, device) for b in shares[ranks.rank]]
    missing = max(map(len, shares)) - len(mine)
    if missing:
        cheapest = min(batches, key=lambda batch: batch.tokens)
        mine += [replace(cheapest.collate(rollouts, pad_id, device), filler=True)] * missing
    return mine


@dataclass(frozen=True, slots=True)
class _Padded:
    """A batch to be made: rollouts ``indices``, ``tokens`` with padding."""

    indices: list[int]
    tokens: int

    def collate(self, rollouts: Sequence[Rollout], pad_id: int, device: Any) -> MicroBatch:
        return _collate(rollouts, self.indices, pad_id, device)


def _plan_padded(rollouts: Sequence[Rollout], indices: Sequence[int], token_budget: int) -> list[_Padded]:
    order = sorted(indices, key=lambda i: (-_length(rollouts[i]), i))
    batches: list[list[int]] = []
    for i in order:
        # Sorted by length, so the first rollout of a batch sets its width.
        if batches and (len(batches[-1]) + 1) * _length(rollouts[batches[-1][0]]) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [_Padded(batch, len(batch) * _length(rollouts[batch[0]])) for batch in batches]


@dataclass(slots=True)
class _PrefixGroup:
    """Rollouts ``indices`` that share their first ``prefix`` tokens, and the tokens they take when packed."""

    indices: list[int]
    prefix: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Packed:
    """A batch to be made: ``groups`` that fill ``tokens`` in all."""

    groups: list[_PrefixGroup]
    tokens: int

    def collate(self, rollouts: Sequence[Rollout], pad_id: int, device: Any) -> MicroBatch:
        return _pack(rollouts, self.groups, device)


def _plan_packed(rollouts: Sequence[Rollout], indices: Sequence[int], token_budget: int) -> list[_Packed]:
    """Groups filled into batches, largest first, each into the first batch with room."""
    groups = sorted(_prefix_groups(rollouts, indices, token_budget), key=lambda group: (-group.tokens, group.indices))
    batches: list[list[_PrefixGroup]] = []
    room: list[int] = []
    for group in groups:
        place = next((b for b, free in enumerate(room) if group.tokens <= free), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(token_budget)
        batches[place].append(group)
        room[place] -= group.tokens
    return [_Packed(batch, sum(group.tokens for group in batch)) for batch in batches]


def _prefix_groups(rollouts: Sequence[Rollout], indices: Sequence[int], token_budget: int) -> list[_PrefixGroup]:
    """Cut the rollouts, sorted by their tokens, into groups; one joins its neighbours where that saves tokens."""
    inputs = {i: _inputs(rollouts[i]) for i in indices}
    groups: list[_PrefixGroup] = []
    for i in sorted(indices, key=lambda i: (inputs[i], i)):
        tokens = len(inputs[i])
        if groups:
            last = groups[-1]
            pairs = zip(inputs[last.indices[-1]][: last.prefix], inputs[i], strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            # A shorter common prefix costs every rollout of the group but one what it no longer shares.
            joined = last.tokens + (len(last.indices) - 1) * (last.prefix - common) + tokens - common
            if joined < last.tokens + tokens and joined <= token_budget:
                last.indices.append(i)
                last.prefix, last.tokens = common, joined
                continue
        groups.append(_PrefixGroup([i], tokens, tokens))
    return groups


def _inputs(rollout: Rollout) -> list[int]:
    """Its tokens before the last sampled one, which is a target only."""
    return rollout.token_ids[: _length(rollout) - 1]


def _length(rollout: Rollout) -> int:
    """Tokens up to and including the last sampled one; what follows it predicts nothing that is trained."""
    lengths = {len(rollout.token_ids), len(rollout.loss_mask), len(rollout.logprobs)}
    if len(lengths) != 1:
        raise ValueError(f"rollout {rollout.rollout_id}: token_ids, loss_mask and logprobs differ in length: {lengths}")
    if not trainable(rollout):
        raise ValueError(f"rollout {rollout.rollout_id}: expected at least one sampled token after the first, got none")
    return len(rollout.loss_mask) - rollout.loss_mask[::-1].index(1)


def sampled_positions(rollout: Rollout) -> list[int]:
    """Positions of the trained tokens. Position 0 has nothing before it and is never trained."""
    return [t for t, sampled in enumerate(rollout.loss_mask) if sampled and t > 0]


def _collate(rollouts: Sequence[Rollout], indices: list[int], pad_id: int, device: Any) -> MicroBatch:
    # The last sampled token is a target only, never an input: width is one less than the length.
    widths = [_length(rollouts[i]) - 1 for i in indices]
    width = max(widths)
    input_ids = torch.full((len(indices), width), pad_id, dtype=torch.int64)  # (B, T)
    attention_mask = torch.zeros_like(input_ids)
    rows: list[int] = []
    targets: list[int] = []
    cu_seqlens = [0]
    for b, i in enumerate(indices):
        input_ids[b, : widths[b]] = torch.tensor(rollouts[i].token_ids[: widths[b]], dtype=torch.int64)
        attention_mask[b, : widths[b]] = 1
        positions = sampled_positions(rollouts[i])
        rows += [b * width + t - 1 for t in positions]
        targets += [rollouts[i].token_ids[t] for t in positions]
        cu_seqlens.append(len(rows))
    position_ids = torch.arange(width).expand(len(indices), width)
    tensors = (
        input_ids, attention_mask, position_ids.contiguous(),
        torch.tensor(rows), torch.tensor(targets), torch.tensor(cu_seqlens),
    )  # fmt: skip
    return MicroBatch(indices, *(tensor.to(device) for tensor in tensors))


def _pack(rollouts: Sequence[Rollout], groups: list[_PrefixGroup], device: Any) -> MicroBatch:
    sequences = [[torch.tensor(_inputs(rollouts[i])) for i in group.indices] for group in groups]
    packed = pack_groups(
        [
            (members[0][: group.prefix], [ids[group.prefix :] for ids in members])
            for members, group in zip(sequences, groups, strict=True)
        ]
    )
    indices = [i for group in groups for i in group.indices]
    rows, targets, cu_seqlens = [], [], [0]
    for g, group in enumerate(groups):
        for member, i in enumerate(group.indices):
            positions = sampled_positions(rollouts[i])
            rows.append(packed.rows(g, member, torch.tensor(positions) - 1))
            targets += [rollouts[i].token_ids[t] for t in positions]
            cu_seqlens.append(len(targets))
    tensors = [torch.cat(rows), torch.tensor(targets), torch.tensor(cu_seqlens)]
    rows_, targets_, cu_seqlens_ = (tensor.to(device) for tensor in tensors)
    input_ids, position_ids, layout = (x.to(device) for x in (packed.input_ids, packed.position_ids, packed.layout))
    return MicroBatch(indices, input_ids, None, position_ids, rows_, targets_, cu_seqlens_, layout)


def engine_logprobs(rollout: Rollout, device: Any = "cpu") -> Any:
    """The engine's log-probabilities of the rollout's trained tokens, ``(n,)`` float32."""
    values = [rollout.logprobs[t] for t in sampled_positions(rollout)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def packed_engine_logprobs(rollouts: Sequence[Rollout], batch: MicroBatch) -> Any:
    """Those of the batch's rollouts, one after the other, ``(N,)`` float32."""
    return torch.cat([engine_logprobs(rollouts[i], batch.rows.device) for i in batch.indices])
