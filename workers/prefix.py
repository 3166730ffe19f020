"""The prefix cache: pages of full columns kept for later requests, also of other variants.

A column is one page of positions across the attention layers of a chain. It is indexed under
(lineage, hash): the lineage names the chain's units and attachments up to a depth, the hash names
all tokens up to the end of the page and the tenant's salt. A chain that others part from at depth d
indexes its columns at d too, and keeps the activations that left unit d - 1 there (its boundary),
so a variant that shares only the units below d takes those pages and computes its own units alone.

Used by `workers.requests` alone. Ids only; boundary activations are stored by the runner in pages.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from workers.pages import Pool

Key = tuple[str, bytes]


@dataclass(eq=False, slots=True)
class Column:
    """One page of positions: `ids` are the pages of attention layers [first_layer, ...); the layers
    below are `below`'s. `boundaries` maps a depth (unit index) to the pages of its activations."""

    ids: np.ndarray
    first_layer: int
    below: "Column | None"
    boundaries: dict[int, np.ndarray]
    pool: Pool
    keys: list[Key] = field(default_factory=list)
    refs: int = 0

    def fill(self, layers: np.ndarray) -> None:
        """Write the page of every layer it covers into `layers`, indexed by layer."""
        column: Column | None = self
        end = len(layers)
        while column is not None:
            first = column.first_layer
            if first < end:
                layers[first:end] = column.ids[: end - first]
                end = first
            column = column.below


@dataclass(frozen=True, slots=True)
class Hit:
    """A column found for a chain: all of it (`depth` None) or the units below `depth`."""

    column: Column
    depth: int | None


def extend_hashes(hashes: list[bytes], tokens: np.ndarray, page: int, salt: int) -> None:
    """Append a hash per full page of `tokens` beyond those that `hashes` cover; each hash covers
    everything before it and the salt."""
    if hashes:
        last = hashes[-1]
    else:
        last = hashlib.blake2b(salt.to_bytes(8, "little", signed=True), digest_size=16).digest()
    data = np.ascontiguousarray(tokens, np.int32).data.cast("B")
    step = page * 4
    for start in range(len(hashes) * step, len(tokens) // page * step, step):
        last = hashlib.blake2b(last + data[start : start + step], digest_size=16).digest()
        hashes.append(last)


class PrefixCache:
    """Columns by key; those that nobody uses are evicted, least recently used first. `pages` counts
    the pages of all columns, in use or not."""

    def __init__(self) -> None:
        self._columns: dict[Key, Column] = {}
        self._idle: OrderedDict[Column, None] = OrderedDict()
        self.pages = 0
        self.evicted_pages = 0

    def find(self, lineages: Sequence[tuple[str, int | None]], digest: bytes) -> Hit | None:
        """The deepest column of this page: `lineages` are (lineage, depth), deepest first."""
        for lineage, depth in lineages:
            column = self._columns.get((lineage, digest))
            if column is not None and (depth is None or depth in column.boundaries):
                return Hit(column, depth)
        return None

    def has(self, key: Key) -> bool:
        """Whether a column is indexed under that very key."""
        return key in self._columns

    def acquire(self, column: Column) -> None:
        """Keep a column from eviction."""
        if column.refs == 0:
            self._idle.pop(column, None)
        column.refs += 1

    def release(self, column: Column) -> None:
        """Undo one `acquire`; an idle column stays until its pages are wanted."""
        column.refs -= 1
        if column.refs == 0:
            self._idle[column] = None

    def publish(self, column: Column, keys: Sequence[Key]) -> None:
        """Index a column that its writer holds under every key not yet taken; the first key is the
        one of its full depth and must be free. The hold on `below` passes from the writer to it."""
        self.pages += _size(column)
        for key in keys:
            if key not in self._columns:
                self._columns[key] = column
                column.keys.append(key)

    def make_room(self, pool: Pool, pages: int) -> bool:
        """Evict idle columns until `pool` can give `pages`; False if it can't."""
        while pool.missing(pages):
            column = next((c for c in self._idle if c.pool is pool), None)
            column = column or next(iter(self._idle), None)
            if column is None:
                return False
            self._evict(column)
        return True

    def _evict(self, column: Column) -> None:
        del self._idle[column]
        size = _size(column)
        self.pages -= size
        self.evicted_pages += size
        for key in column.keys:
            del self._columns[key]
        column.pool.free(column.ids)
        for ids in column.boundaries.values():
            column.pool.free(ids)
        if column.below is not None:
            self.release(column.below)


def _size(column: Column) -> int:
    return len(column.ids) + sum(len(ids) for ids in column.boundaries.values())
