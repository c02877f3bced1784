"""The key-value cache of rows that come and go: every row stands right-aligned at one common end.

A row's tokens lie in the slots ``[end - length, end)`` of its place, without holes, so that distances in slots are
distances in tokens (sliding windows are right) and one decoding step writes one slot for all rows. What a row keeps
while it is outside of the batch is a copy of exactly its own slots. Tensors of one shape lie in one buffer, so that a
row moves with one copy per shape instead of two per layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from hiexp._extras import require

torch = require("torch", "train", "hiexp.agent.kv_cache")
cache_utils = require("transformers.cache_utils", "train", "hiexp.agent.kv_cache")

_SPARE_SLOTS = 64  # least room for new slots; a turn of a small agent fits without growing again

Stored = list[Any]  # one tensor (count, heads, length, size) per group of a layout


class Place(NamedTuple):
    """Where a tensor lies: which buffer, and which part of it."""

    group: int
    part: int


class Layout:
    """What a model keeps per slot, learned from the cache of one forward pass.

    Attributes:
        groups: per buffer the number of its tensors, their heads and size, dtype and device.
        keys, values: per layer the :class:`Place` of its tensor; None for a layer that keeps nothing.
    """

    def __init__(self, cache: Any) -> None:
        self.groups: list[tuple[int, int, int, Any, Any]] = []
        self.keys: list[Place | None] = []
        self.values: list[Place | None] = []
        known: dict[tuple[int, int, Any, Any], int] = {}
        for layer in cache.layers:
            if not isinstance(layer, cache_utils.DynamicLayer):
                raise ValueError(f"model: expected attention layers with a cache, got {type(layer).__name__}")
            kept = layer.is_initialized
            self.keys.append(self._place(layer.keys, known) if kept else None)
            self.values.append(self._place(layer.values, known) if kept else None)

    def _place(self, part: Any, known: dict[tuple[int, int, Any, Any], int]) -> Place:
        kind = (part.shape[1], part.shape[3], part.dtype, part.device)
        if kind not in known:
            known[kind] = len(self.groups)
            self.groups.append((0, *kind))
        group = known[kind]
        count, *rest = self.groups[group]
        self.groups[group] = (count + 1, *rest)
        return Place(group, count)


class RowLayer(cache_utils.DynamicLayer):  # type: ignore[misc, name-defined, unused-ignore]
    """One layer of a :class:`RowCache`, as transformers addresses it."""

    def __init__(self, cache: RowCache, keys: Place | None, values: Place | None) -> None:
        super().__init__()
        # A strong reference would be a cycle, and the buffers would stay until Python's next full collection.
        self._cache = weakref.proxy(cache)
        self._places = (keys, values)
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write a block (B, heads, q, size) behind the end; all slots in use, the block included."""
        keys, values = self._places
        return self._cache.write(keys, key_states), self._cache.write(values, value_states)

    def get_seq_length(self) -> int:
        """Slots in use before the block that is being written."""
        return int(self._cache.used)


class RowCache(cache_utils.Cache):  # type: ignore[misc, name-defined, unused-ignore]
    """Keys and values of ``len(lengths)`` rows, see the module.

    Attributes:
        lengths: tokens of each row; the rows are places 0 to n - 1.
        end: the slot behind the last token of every row.
    """

    def __init__(self, layout: Layout, rows: int, slots: int) -> None:
        super().__init__(layers=[RowLayer(self, *places) for places in zip(layout.keys, layout.values, strict=True)])
        self.layout = layout
        self.lengths: list[int] = []
        self.end = 0
        self._buffers = self._allocate(rows, slots)

    @property
    def used(self) -> int:
        """Slots that the longest row takes."""
        return max(self.lengths, default=0)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and slots of the buffers."""
        return self._buffers[0].shape[1], self._buffers[0].shape[3]

    def _allocate(self, rows: int, slots: int) -> list[Any]:
        # Zeros, not whatever was there: a NaN in a masked slot would still reach the sum.
        return [
            torch.zeros((count, rows, heads, slots, size), dtype=dtype, device=device)
            for count, heads, size, dtype, device in self.layout.groups
        ]

    def reserve(self, rows: int, slots: int, ahead: int) -> None:
        """Make room for ``rows`` rows of up to ``slots`` tokens and ``ahead`` slots behind the end."""
        has_rows, has_slots = self.capacity
        if rows <= has_rows and slots <= self.end and self.end + ahead <= has_slots:
            return
        end = max(slots, self.used)
        # A change of size copies all there is: buffers grow by more than is asked, and shrink when half is free.
        if rows > has_rows:
            rows = max(rows, has_rows + has_rows // 4)
        elif 2 * rows > has_rows:
            rows = has_rows
        old, self._buffers = self._buffers, self._allocate(rows, end + max(ahead, _SPARE_SLOTS, end // 2))
        n, used = len(self.lengths), self.used
        for new, part in zip(self._buffers, old, strict=True):
            new[:, :n, :, end - used : end] = part[:, :n, :, self.end - used : self.end]
        self.end = end

    def write(self, place: Place | None, block: Any) -> Any:
        """Store ``block`` (B, heads, q, size) behind the end; the view (B, heads, used + q, size)."""
        if place is None:
            return block
        rows, width = block.shape[0], block.shape[2]
        part = self._buffers[place.group][place.part, :rows]
        part[:, :, self.end : self.end + width] = block
        return part[:, :, self.end - self.used : self.end + width]

    def advance(self, lengths: Sequence[int], width: int) -> None:
        """The block of ``width`` slots is written; the rows have ``lengths`` tokens now."""
        self.lengths, self.end = list(lengths), self.end + width

    def add(self, stored: Stored | None, length: int) -> None:
        """A further row with the first ``length`` tokens of ``stored``, right-aligned; room must be reserved."""
        place = len(self.lengths)
        self.lengths.append(length)
        if stored is not None and length:
            for part, kept in zip(self._buffers, stored, strict=True):
                part[:, place, :, self.end - length : self.end] = kept[:, :, :length]

    def view(self, place: int) -> Stored:
        """The slots of one row, valid until the cache is written again."""
        start = self.end - self.lengths[place]
        return [part[:, place, :, start : self.end] for part in self._buffers]

    def take(self, place: int) -> Stored:
        """A copy of :meth:`view`."""
        return [part.clone() for part in self.view(place)]

    def drop(self, place: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if place != last:
            start = self.end - self.lengths[last]
            for part in self._buffers:
                part[:, place, :, start : self.end] = part[:, last, :, start : self.end]
            self.lengths[place] = self.lengths[last]
        self.lengths.pop()
