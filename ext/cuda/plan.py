"""A wave's geometry on the device: what the attention kernels read, made once for all layers."""

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


@dataclass(eq=False, slots=True)
class CudaPlan:
    """`sequences` and `positions` int32 [rows]; `tables` int32 [S, layers, P]; `singles` int32, the
    rows of sequences of one row; `longest` is the largest context among those."""

    geometry: Geometry
    device: torch.device
    sequences: Tensor
    positions: Tensor
    tables: Tensor
    singles: Tensor
    longest: int
    chunks: np.ndarray
    single_blocks: Blocks
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
            self._chunk_blocks[rows] = Blocks(to_device(data, self.device), len(blocks))
        return self._chunk_blocks[rows]

    def spans(self, programs: int, kv_heads: int) -> tuple[int, int]:
        """Into how many spans the contexts of single rows are split so that `programs` have work,
        and how many positions each has."""
        tiles = -(-self.longest // BLOCK_KEYS)
        wanted = programs // max(1, self.single_blocks.count * kv_heads)
        count = max(1, min(tiles, wanted, _MAX_SPANS))
        length = -(-tiles // count) * BLOCK_KEYS
        return -(-self.longest // length), length


def make_plan(geometry: Geometry, device: torch.device) -> CudaPlan:
    """Prepare a geometry for the kernels."""
    starts, contexts = geometry.starts, geometry.contexts
    counts = np.diff(starts)
    sequences = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(geometry.num_rows) + (contexts - starts[1:])[sequences]
    single = np.flatnonzero(counts == 1)
    rows = starts[:-1][single]
    ones = np.ones_like(single)
    blocks = np.stack((single, rows, ones, contexts[single] - 1), 1)
    return CudaPlan(
        geometry=geometry,
        device=device,
        sequences=to_device(sequences, device),
        positions=to_device(positions, device),
        tables=to_device(geometry.tables, device),
        singles=to_device(rows, device),
        longest=int(contexts[single].max()) if len(single) else 0,
        chunks=np.flatnonzero(counts > 1),
        single_blocks=Blocks(to_device(blocks, device), len(single)),
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An int32 copy on the device; from pinned memory, so that the host does not wait."""
    host = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)
