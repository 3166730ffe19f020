"""A wave's geometry on the device: what the attention kernels read, made once for all layers.

All of it lies in one int32 buffer, so it costs one copy. A plan of fixed size (`StaticPlan`) keeps
its buffer and takes in one decode batch after the other: what a captured graph reads.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

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

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The parts of a buffer: longest context of single rows [1], sequence and position of each
        row, the rows that are alone, their blocks [singles, 4], page tables [S, layers, P]."""
        sizes = (1, self.rows, self.rows, self.singles, self.singles * 4)
        *parts, tables = buffer.split((*sizes, self.sequences * self.layers * self.pages))
        shape = (self.sequences, self.layers, self.pages)
        return (*parts[:4], parts[4].view(-1, 4), tables.view(shape))


@dataclass(eq=False, slots=True)
class CudaPlan:
    """`sequences` and `positions` int32 [rows]; `tables` int32 [S, layers, P]; `singles` int32, the
    rows of sequences of one row; `longest` [1] is the largest context among those, and
    `longest_known` the host's bound of it. `chunks` are the sequences of several rows."""

    geometry: Geometry
    buffer: Tensor
    longest: Tensor
    sequences: Tensor
    positions: Tensor
    singles: Tensor
    single_blocks: Blocks
    tables: Tensor
    longest_known: int
    chunks: np.ndarray
    _chunk_blocks: dict[int, Blocks] = field(default_factory=dict)

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
            self._chunk_blocks[rows] = Blocks(to_device(data, self.buffer.device), len(blocks))
        return self._chunk_blocks[rows]

    def spans(self, programs: int, kv_heads: int) -> int:
        """Into how many spans the contexts of single rows are split so that `programs` have
        work."""
        tiles = -(-self.longest_known // BLOCK_KEYS)
        wanted = programs // max(1, self.single_blocks.count * kv_heads)
        return max(1, min(tiles, wanted, _MAX_SPANS))


class StaticPlan:
    """A plan for decode batches of up to `rows` sequences, always at the same addresses.

    Rows that a batch does not fill read and write the page `scratch`, which nobody else uses."""

    def __init__(self, layout: Layout, scratch: int, device: torch.device) -> None:
        if not layout.rows == layout.sequences == layout.singles:
            raise ValueError("a plan of fixed size is for sequences of one row each")
        self._layout = layout
        self._scratch = scratch
        size = _pack(self._padded(_nothing()), layout).size
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self.plan = _plan(self._padded(_nothing()), layout, self._buffer)
        # Contexts grow from replay to replay: the split is made for the longest there can be.
        self.plan.longest_known = layout.pages * BLOCK_KEYS

    def load(self, geometry: Geometry) -> None:
        """Take in a decode batch; what is captured with `plan` runs on it from now on."""
        packed = _pack(self._padded(geometry), self._layout)
        self._buffer.copy_(_host(packed, self._buffer.device), non_blocking=True)

    def _padded(self, geometry: Geometry) -> Geometry:
        count, layout = geometry.num_sequences, self._layout
        tables = np.full((layout.sequences, layout.layers, layout.pages), self._scratch, np.int32)
        _, layers, pages = geometry.tables.shape
        tables[:count, :layers, :pages] = geometry.tables
        contexts = np.ones(layout.sequences, np.int32)
        contexts[:count] = geometry.contexts
        return Geometry(np.arange(layout.rows + 1, dtype=np.int32), contexts, tables)


def make_plan(geometry: Geometry, device: torch.device) -> CudaPlan:
    """Prepare a geometry for the kernels."""
    singles = int((np.diff(geometry.starts) == 1).sum())
    sequences, layers, pages = geometry.tables.shape
    layout = Layout(geometry.num_rows, sequences, singles, layers, pages)
    return _plan(geometry, layout, to_device(_pack(geometry, layout), device))


def _plan(geometry: Geometry, layout: Layout, buffer: Tensor) -> CudaPlan:
    longest, sequences, positions, singles, blocks, tables = layout.views(buffer)
    counts = np.diff(geometry.starts)
    alone = geometry.contexts[counts == 1]
    return CudaPlan(
        geometry=geometry,
        buffer=buffer,
        longest=longest,
        sequences=sequences,
        positions=positions,
        singles=singles,
        single_blocks=Blocks(blocks, layout.singles),
        tables=tables,
        longest_known=int(alone.max()) if len(alone) else 0,
        chunks=np.flatnonzero(counts > 1),
    )


def _pack(geometry: Geometry, layout: Layout) -> np.ndarray:
    """A plan's buffer, int32, in the order of `Layout.views`."""
    starts, contexts = geometry.starts, geometry.contexts
    counts = np.diff(starts)
    sequences = np.repeat(np.arange(layout.sequences), counts)
    positions = np.arange(layout.rows) + (contexts - starts[1:])[sequences]
    single = np.flatnonzero(counts == 1)
    rows = starts[:-1][single]
    blocks = np.stack((single, rows, np.ones_like(single), contexts[single] - 1), 1)
    longest = contexts[single].max() if len(single) else 0
    parts = ([longest], sequences, positions, rows, blocks.ravel(), geometry.tables.ravel())
    return np.concatenate(parts).astype(np.int32)


def _nothing() -> Geometry:
    return Geometry(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros((0, 0, 0), np.int32))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An int32 copy on the device; from pinned memory, so that the host does not wait."""
    return _host(np.ascontiguousarray(array, dtype=np.int32), device).to(device, non_blocking=True)


def _host(array: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host
