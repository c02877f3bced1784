"""Groups of continuations behind a common prefix, packed into one row of tokens: [P1 .. Pn | R11 .. R1G .. Rn1 .. RnG].

Each prefix is there once. A token of a response sees its prefix and the tokens before it in its own response, a token
of a prefix sees that prefix; positions restart behind the prefix for every response. All prefixes come first, so that
"every response to its own prefix" is one call of a variable-length attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

Group = tuple[torch.Tensor, Sequence[torch.Tensor]]  # prefix ids (P,), ids of its responses (R1,) .. (RG,)


@dataclass(frozen=True)
class Part:
    """One attention call: segment i of the queries sees segment i of the keys.

    Attributes:
        queries, keys: n + 1 offsets each into the packed tokens; segment i is ``[offsets[i], offsets[i + 1])``.
        causal: within segments of equal length, token j sees tokens up to j; else it sees all keys of its segment.
        queries_on_device, keys_on_device: the offsets from 0, (n + 1,) int32, for variable-length kernels.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    queries_on_device: torch.Tensor
    keys_on_device: torch.Tensor

    def segments(self) -> list[tuple[slice, slice]]:
        """Query and key rows of each segment."""
        pairs = zip(pairwise(self.queries), pairwise(self.keys), strict=True)
        return [(slice(*queries), slice(*keys)) for queries, keys in pairs]

    def to(self, device: Any) -> Part:
        offsets = self.queries_on_device.to(device), self.keys_on_device.to(device)
        return Part(self.queries, self.keys, self.causal, *offsets)


@dataclass(frozen=True)
class PrefixLayout:
    """Who sees whom among T packed tokens.

    Attributes:
        own: every prefix and every response to itself, causal; covers all T tokens.
        cross: responses to their prefixes; None where there is no response.
        longest: the highest position + 1.
    """

    own: Part
    cross: Part | None
    longest: int

    def to(self, device: Any) -> PrefixLayout:
        """The same layout with its offsets on ``device``."""
        return PrefixLayout(self.own.to(device), None if self.cross is None else self.cross.to(device), self.longest)


@dataclass(frozen=True)
class PackedGroups:
    """Packed tokens of one or more groups.

    Attributes:
        input_ids, position_ids: (1, T) int64.
        layout: see :class:`PrefixLayout`.
        starts: for each group its first prefix row, the prefix length, and the first row of every response.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PrefixLayout
    starts: list[tuple[int, int, list[int]]]

    def rows(self, group: int, response: int, positions: torch.Tensor) -> torch.Tensor:
        """Packed rows (n,) of the tokens at ``positions`` (n,) int64 of prefix + response; prefix rows are common."""
        prefix_start, prefix_length, response_starts = self.starts[group]
        behind = response_starts[response] - prefix_length
        return positions + torch.where(positions < prefix_length, prefix_start, behind)


def pack_groups(groups: Sequence[Group]) -> PackedGroups:
    """Pack groups, each with a prefix of at least one token; responses may be empty. All ids are on one device."""
    device = groups[0][0].device
    # Groups without a response token come last: the cross part then starts at key 0 and has no empty segment.
    order = sorted(range(len(groups)), key=lambda i: sum(len(response) for response in groups[i][1]) == 0)
    prefixes = [len(groups[i][0]) for i in order]
    lengths = [[len(response) for response in groups[i][1]] for i in order]
    flat = [length for group in lengths for length in group]
    first = [*accumulate(prefixes, initial=0)]
    behind = [*accumulate(flat, initial=first[-1])]
    starts: list[tuple[int, int, list[int]]] = [(0, 0, [])] * len(groups)
    position_ids = [torch.arange(length) for length in prefixes]
    responses = 0
    for place, i in enumerate(order):
        own = behind[responses : responses + len(lengths[place])]
        starts[i] = (first[place], prefixes[place], own)
        position_ids += [torch.arange(prefixes[place], prefixes[place] + length) for length in lengths[place]]
        responses += len(lengths[place])
    ids = [groups[i][0] for i in order] + [response for i in order for response in groups[i][1]]
    longest = max(prefix + max(group, default=0) for prefix, group in zip(prefixes, lengths, strict=True))
    own_offsets = sorted({*first, *behind})
    totals = [sum(group) for group in lengths if sum(group)]
    cross = None
    if totals:
        queries = [*accumulate(totals, initial=first[-1])]
        cross = _part(queries, first[: len(totals) + 1], False, device)
    layout = PrefixLayout(_part(own_offsets, own_offsets, True, device), cross, longest)
    return PackedGroups(torch.cat(ids)[None], torch.cat(position_ids)[None].to(device), layout, starts)


def _part(queries: Sequence[int], keys: Sequence[int], causal: bool, device: torch.device) -> Part:
    on_device = [
        torch.tensor([offset - offsets[0] for offset in offsets], dtype=torch.int32).to(device)
        for offsets in (queries, keys)
    ]
    return Part(tuple(queries), tuple(keys), causal, on_device[0], on_device[1])
