"""KV memory seen by requests: pools per KV shape over one arena, table slots and page tables.

A table row says which page holds a sequence's positions at each attention layer: tables[slot,
layer, p] is the page of positions [page * p, page * (p + 1)). Rows are written when a request
starts and only read afterwards. Ids and numpy only; the bytes behind the ids belong to the runner.
"""

from collections.abc import Sequence

import numpy as np

from workers.chains import KvElement, KvShape
from workers.pages import Arena, Pool

_ELEMENT_BYTES: dict[KvElement, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvMemory:
    """The arena, its pools, and one page table per running sequence."""

    def __init__(self, arena: Arena, *, page: int, max_sequences: int) -> None:
        self.arena = arena
        self.page = page
        self._pools: dict[KvShape, Pool] = {}
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._tables = np.zeros((max_sequences, 1, 1), np.int32)

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def page_bytes(self, shape: KvShape) -> int:
        """Bytes of one page: K and V of `page` positions of one layer."""
        return 2 * self.page * shape.kv_heads * shape.head_dim * _ELEMENT_BYTES[shape.element]

    def pool(self, shape: KvShape) -> Pool:
        """The pool of a shape, made when it is first wanted."""
        if shape not in self._pools:
            self._pools[shape] = Pool(self.arena, self.page_bytes(shape))
        return self._pools[shape]

    def pages(self, tokens: int) -> int:
        """Page columns that `tokens` positions take."""
        return -(-tokens // self.page)

    def largest_request(self, shape: KvShape, layers: int) -> int:
        """Tokens of the longest request that the whole arena could hold."""
        return self.pool(shape).largest_total // max(1, layers) * self.page

    def take_slot(self, layers: int, columns: int) -> tuple[int, np.ndarray]:
        """A free slot and its table [layers, columns], to be filled."""
        have = self._tables.shape
        if layers > have[1] or columns > have[2]:
            grown = np.zeros((have[0], max(layers, have[1]), max(columns, 2 * have[2])), np.int32)
            grown[:, : have[1], : have[2]] = self._tables
            self._tables = grown
        slot = self._slots.pop()
        return slot, self._tables[slot, :layers, :columns]

    def table(self, slot: int, layers: int, columns: int) -> np.ndarray:
        """The table [layers, columns] of a slot in use."""
        return self._tables[slot, :layers, :columns]

    def give_slot(self, slot: int) -> None:
        self._slots.append(slot)

    def tables(self, slots: Sequence[int], layers: int, columns: int) -> np.ndarray:
        """Tables [len(slots), layers, columns] of one wave."""
        return self._tables[np.asarray(slots, np.int64), :layers, :columns]

    def usage(self) -> tuple[int, int]:
        """Free and total pages, counted in pages of the shapes in use (free slabs included)."""
        pools = list(self._pools.values())
        smallest = min((p.page_bytes for p in pools), default=self.arena.slab_bytes)
        spare = self.arena.free_slabs * (self.arena.slab_bytes // smallest)
        return spare + sum(p.num_free for p in pools), spare + sum(p.total for p in pools)
