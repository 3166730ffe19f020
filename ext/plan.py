"""A wave's geometry as the native CPU kernels read it: made once, for every layer."""

from dataclasses import dataclass

import numpy as np

from ext import native
from ext.ops import Geometry

_BLOCK_ROWS = 32


@dataclass(eq=False, slots=True)
class CpuPlan:
    """The int32 arrays that the record points at: see `Plan` in records.h."""

    geometry: Geometry
    num_rows: int
    num_layers: int
    num_positions: int
    row_positions: np.ndarray
    arrays: tuple[np.ndarray, ...]
    record: native.Record


def prepare(geometry: Geometry) -> CpuPlan:
    """Positions of rows, and the blocks of rows that attend together."""
    starts, contexts = geometry.starts, geometry.contexts
    counts = np.diff(starts)
    sequences = np.arange(len(counts))
    row_sequence = np.repeat(sequences, counts)
    rows = np.arange(geometry.num_rows)
    row_positions = rows + (contexts - starts[1:])[row_sequence]
    blocks = -(-counts // _BLOCK_ROWS)
    owner = np.repeat(sequences, blocks)
    index = np.arange(len(owner)) - (np.cumsum(blocks) - blocks)[owner]
    first = np.append(starts[:-1][owner] + index * _BLOCK_ROWS, geometry.num_rows)
    arrays = tuple(
        np.ascontiguousarray(array, dtype=np.int32)
        for array in (geometry.tables, row_sequence, row_positions, first)
    )
    _, layers, pages = geometry.tables.shape
    record = native.Record(
        native.PLAN.pack(*(a.ctypes.data for a in arrays), len(rows), len(owner), layers, pages)
    )
    last = int(contexts.max()) if len(contexts) else 0
    return CpuPlan(geometry, len(rows), layers, last, arrays[2], arrays, record)
