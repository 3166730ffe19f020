"""A wave's geometry on the device: what the attention kernels read, made once for all layers.

All of it lies in one int32 buffer, so it costs one copy, and none where a captured step brings its
own plan: one of fixed size (`StaticPlan`), which takes in one decode batch after the other.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ext.cuda.parcel import staged, to_device
from ext.ops import Geometry

# Positions per tile of keys; a span of a split context is a multiple of it.
BLOCK_KEYS = 64
_MAX_SPANS = 32


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of one sequence each, for one program each: int32 [n, 4] of sequence, first row, rows,
    first position."""

    data: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a plan: rows, sequences, sequences of one row, layers, pages per sequence."""

    rows: int
    sequences: int
    singles: int
    layers: int
    pages: int

    @property
    def head(self) -> int:
        """Elements before the page tables."""
        return 1 + 2 * self.rows + 5 * self.singles

    @property
    def size(self) -> int:
        """Elements in all."""
        return self.head + self.sequences * self.layers * self.pages

    def parts(self, buffer: Tensor) -> "Parts":
        """A buffer under the names of what lies in it."""
        sizes = (1, self.rows, self.rows, self.singles, self.singles * 4)
        longest, sequences, positions, singles, blocks, tables = buffer.split(
            (*sizes, self.size - self.head)
        )
        return Parts(
            longest=longest,
            sequences=sequences,
            positions=positions,
            singles=singles,
            single_blocks=Blocks(blocks.view(-1, 4), self.singles),
            tables=tables.view(self.sequences, self.layers, self.pages),
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """A plan on the device, int32: `longest` [1] is the largest context among sequences of one row,
    `singles` are their rows; `sequences` and `positions` [rows]; `tables` [S, layers, P]."""

    longest: Tensor
    sequences: Tensor
    positions: Tensor
    singles: Tensor
    single_blocks: Blocks
    tables: Tensor


class Follower(Protocol):
    """Something prepared for a static plan, by whoever needs more than its parts."""

    def take(self, plan: "CudaPlan") -> None:
        """Prepare for the batch that the plan holds now."""
        ...


class CudaPlan:
    """A geometry, and its parts on the device once somebody wants them. `longest_known` is the
    host's bound of the contexts of single rows; `chunks` are the sequences of several rows. A plan
    that `is_static` takes in batch after batch: `contexts` are those of its last, and whoever
    prepared something of his own for it is given the next (`followers`)."""

    def __init__(
        self, geometry: Geometry, device: torch.device, parts: Parts | None = None
    ) -> None:
        counts = np.diff(geometry.starts)
        alone = geometry.contexts[counts == 1]
        self.geometry = geometry
        self.contexts = geometry.contexts
        self.is_static = parts is not None
        self.followers: dict[Hashable, Follower] = {}
        self.longest_known = int(alone.max()) if len(alone) else 0
        self.num_singles = len(alone)
        self.chunks = np.flatnonzero(counts > 1)
        self._device = device
        self._parts = parts
        self._chunk_blocks: dict[int, Blocks] = {}

    @property
    def parts(self) -> Parts:
        """What the kernels read."""
        if self._parts is None:
            geometry = self.geometry
            sequences, layers, pages = geometry.tables.shape
            layout = Layout(geometry.num_rows, sequences, self.num_singles, layers, pages)
            self._parts = layout.parts(to_device(_pack(geometry), self._device))
        return self._parts

    @property
    def positions(self) -> Tensor:
        """Where each row stands, int32 [rows]."""
        return self.parts.positions

    def chunk_blocks(self, rows: int) -> Blocks:
        """Sequences of several rows, cut into blocks of at most `rows`."""
        if rows not in self._chunk_blocks:
            starts, contexts = self.geometry.starts, self.geometry.contexts
            bounds = [
                (i, int(starts[i]), int(starts[i + 1]), int(contexts[i])) for i in self.chunks
            ]
            blocks = [
                (i, row, min(rows, last - row), context - last + row)
                for i, first, last, context in bounds
                for row in range(first, last, rows)
            ]
            # Longest first: the programs that end last should not also start last.
            blocks.sort(key=lambda block: -block[3])
            data = np.array(blocks, np.int32).reshape(-1, 4)
            self._chunk_blocks[rows] = Blocks(to_device(data, self._device), len(blocks))
        return self._chunk_blocks[rows]

    def spans(self, programs: int, kv_heads: int) -> int:
        """Into how many spans the contexts of single rows are split so that `programs` have
        work."""
        tiles = -(-self.longest_known // BLOCK_KEYS)
        wanted = programs // max(1, self.num_singles * kv_heads)
        return max(1, min(tiles, wanted, _MAX_SPANS))


class StaticPlan:
    """A plan for decode batches of up to `rows` sequences, always at the same addresses.

    Rows that a batch does not fill read and write the page `scratch`, which nobody else uses."""

    def __init__(self, layout: Layout, scratch: int, device: torch.device) -> None:
        if not layout.rows == layout.sequences == layout.singles:
            raise ValueError("a plan of fixed size is for sequences of one row each")
        self._layout = layout
        self._scratch = scratch
        tables = np.full((layout.rows, layout.layers, layout.pages), scratch, np.int32)
        contexts = np.ones(layout.rows, np.int32)
        geometry = Geometry(np.arange(layout.rows + 1, dtype=np.int32), contexts, tables)
        self._host = _pack(geometry)
        self._buffer = to_device(self._host.copy(), device)
        self._tables = self._host[layout.head :].reshape(tables.shape)
        self._filled = 0
        self.plan = CudaPlan(geometry, device, layout.parts(self._buffer))
        # Contexts grow from replay to replay: the split is made for the longest there can be.
        self.plan.longest_known = layout.pages * BLOCK_KEYS

    def load(self, geometry: Geometry) -> None:
        """Take in a decode batch; what is captured with `plan` runs on it from now on."""
        layout, count = self._layout, geometry.num_sequences
        contexts = np.ones(layout.rows, np.int32)
        contexts[:count] = geometry.contexts
        self._host[0] = contexts.max()
        self._host[1 + layout.rows : 1 + 2 * layout.rows] = contexts - 1
        self._host[1 + 3 * layout.rows : layout.head].reshape(-1, 4)[:, 3] = contexts - 1
        # Tables change only when a sequence comes or goes, or enters a new page.
        sent = layout.head
        if not self._has(geometry):
            self._fill(geometry)
            sent = layout.size
        source = staged(self._host[:sent], self._buffer.device)
        self._buffer[:sent].copy_(source, non_blocking=True)
        self.plan.contexts = contexts
        for follower in self.plan.followers.values():
            follower.take(self.plan)

    def _has(self, geometry: Geometry) -> bool:
        count, layers, pages = geometry.tables.shape
        return count == self._filled and np.array_equal(
            self._tables[:count, :layers, :pages], geometry.tables
        )

    def _fill(self, geometry: Geometry) -> None:
        count, layers, pages = geometry.tables.shape
        self._tables.fill(self._scratch)
        self._tables[:count, :layers, :pages] = geometry.tables
        self._filled = count


def _pack(geometry: Geometry) -> np.ndarray:
    """A plan's buffer, int32, in the order of `Layout.parts`."""
    starts, contexts = geometry.starts, geometry.contexts
    counts = np.diff(starts)
    sequences = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(geometry.num_rows) + (contexts - starts[1:])[sequences]
    single = np.flatnonzero(counts == 1)
    rows = starts[:-1][single]
    blocks = np.stack((single, rows, np.ones_like(single), contexts[single] - 1), 1)
    longest = contexts[single].max() if len(single) else 0
    parts = ([longest], sequences, positions, rows, blocks.ravel(), geometry.tables.ravel())
    return np.concatenate(parts, dtype=np.int32, casting="same_kind")
