"""KV memory of one worker: an arena of bytes, cut into pages for every shape of KV that is served.

A page holds 16 positions of one attention layer, K and V. Chains of different shapes share one
budget: the arena is divided into slabs, a pool (one per shape) takes slabs when it needs pages and
gives them back when every page of a slab is free. Owned by the worker's loop; `workers.requests`
takes and returns pages, `workers.prefix` keeps some of them for reuse. No torch: ids only."""

import numpy as np

SLAB_BYTES = 4 * 1024 * 1024


class Arena:
    """The budget: `num_slabs` slabs, each owned by no pool or by one."""

    def __init__(self, total_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self.num_slabs = max(1, total_bytes // slab_bytes)
        self._free = list(range(self.num_slabs - 1, -1, -1))
        self._pools: list[Pool] = []

    @property
    def total_bytes(self) -> int:
        return self.num_slabs * self.slab_bytes

    @property
    def free_slabs(self) -> int:
        return len(self._free)

    def join(self, pool: "Pool") -> None:
        """Let `pool` draw from this arena."""
        self._pools.append(pool)

    def take_slab(self, asking: "Pool") -> int | None:
        """A slab for `asking`: a free one, else one that another pool no longer uses."""
        if not self._free:
            for pool in self._pools:
                if pool is not asking and (slab := pool.give_slab()) is not None:
                    self._free.append(slab)
                    break
        return self._free.pop() if self._free else None


class Pool:
    """Pages of one shape: ids into the arena seen as pages of `page_bytes`.

    A page is free or taken: by a running request, which takes all it can ever need before it starts
    (so memory never runs out in flight), or by the prefix cache.
    """

    def __init__(self, arena: Arena, page_bytes: int) -> None:
        if page_bytes > arena.slab_bytes:
            raise ValueError(f"a page of {page_bytes} bytes is larger than a slab")
        self.page_bytes = page_bytes
        self._arena = arena
        self._slabs: set[int] = set()
        self._free = np.empty(256, np.int32)
        self._num_free = 0
        self.total = 0
        arena.join(self)

    @property
    def num_ids(self) -> int:
        """One more than the largest id that this pool can ever hand out."""
        return self._arena.total_bytes // self.page_bytes

    @property
    def num_free(self) -> int:
        """Free pages in the slabs held."""
        return self._num_free

    @property
    def largest_total(self) -> int:
        """Pages there would be if this pool had the whole arena."""
        return self._arena.num_slabs * (self._arena.slab_bytes // self.page_bytes - 1)

    def missing(self, pages: int) -> int:
        """How many pages are lacking before `pages` can be taken; draws free slabs first."""
        while (short := pages - self._num_free) > 0:
            slab = self._arena.take_slab(self)
            if slab is None:
                return short
            self._add(slab)
        return 0

    def take(self, pages: int) -> np.ndarray:
        """`pages` page ids, int32; only after `missing(pages)` was 0."""
        assert pages <= self._num_free, "more pages taken than are free"
        self._num_free -= pages
        return self._free[self._num_free : self._num_free + pages].copy()

    def free(self, ids: np.ndarray) -> None:
        """Return pages."""
        end = self._num_free + len(ids)
        self._grow(end)
        self._free[self._num_free : end] = ids
        self._num_free = end

    def give_slab(self) -> int | None:
        """Give up one slab none of whose pages is in use, if there is one."""
        free = self._free[: self._num_free]
        slab_of = free.astype(np.int64) * self.page_bytes // self._arena.slab_bytes
        counts = np.bincount(slab_of, minlength=self._arena.num_slabs)
        for slab in sorted(self._slabs):
            ids = self._ids(slab)
            if counts[slab] == len(ids):
                kept = free[slab_of != slab]
                self._free[: len(kept)] = kept
                self._num_free = len(kept)
                self._slabs.discard(slab)
                self.total -= len(ids)
                return slab
        return None

    def _ids(self, slab: int) -> np.ndarray:
        """Pages that lie wholly within a slab."""
        size = self._arena.slab_bytes
        first = -(-slab * size // self.page_bytes)
        last = (slab + 1) * size // self.page_bytes
        return np.arange(first, last, dtype=np.int32)

    def _add(self, slab: int) -> None:
        ids = self._ids(slab)
        self._slabs.add(slab)
        self.total += len(ids)
        self.free(ids[::-1])

    def _grow(self, needed: int) -> None:
        if needed > len(self._free):
            larger = np.empty(max(needed, 2 * len(self._free)), np.int32)
            larger[: self._num_free] = self._free[: self._num_free]
            self._free = larger
