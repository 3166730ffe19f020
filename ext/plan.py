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


def prepare(geometry: Geometry, last: CpuPlan | None = None) -> CpuPlan:
    """Positions of rows, and the blocks of rows that attend together. `last` is what was prepared
    before: where only the contexts of decoding sequences have changed, it is moved on."""
    if last is not None and _goes_on(geometry, last):
        last.geometry = geometry
        np.subtract(geometry.contexts, 1, out=last.row_positions)
        last.num_positions = max(geometry.contexts.tolist())
        return last
    contexts, num_rows = geometry.contexts, geometry.num_rows
    first = np.arange(num_rows + 1)
    if np.array_equal(geometry.starts, first):
        # Each sequence has one row, as while all decode.
        row_sequence, row_positions = first[:-1], contexts - 1
    else:
        row_sequence, row_positions, first = _divide(geometry)
    arrays = tuple(
        np.ascontiguousarray(array, dtype=np.int32)
        for array in (geometry.tables, row_sequence, row_positions, first)
    )
    _, layers, pages = geometry.tables.shape
    addresses = (array.ctypes.data for array in arrays)
    record = native.Record(native.PLAN.pack(*addresses, num_rows, len(first) - 1, layers, pages))
    positions = int(contexts.max()) if len(contexts) else 0
    return CpuPlan(geometry, num_rows, layers, positions, arrays[2], arrays, record)


def _goes_on(geometry: Geometry, last: CpuPlan) -> bool:
    """Whether the same sequences have a row each, and the same pages."""
    return (
        geometry.tables is last.geometry.tables
        and geometry.starts is last.geometry.starts
        and last.num_rows == len(geometry.contexts)
    )


def _divide(geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sequence and the position of each row, and the first row of each block and behind all."""
    starts = geometry.starts
    counts = np.diff(starts)
    sequences = np.arange(len(counts))
    row_sequence = np.repeat(sequences, counts)
    row_positions = np.arange(geometry.num_rows) + (geometry.contexts - starts[1:])[row_sequence]
    blocks = -(-counts // _BLOCK_ROWS)
    owner = np.repeat(sequences, blocks)
    index = np.arange(len(owner)) - (np.cumsum(blocks) - blocks)[owner]
    first = np.append(starts[:-1][owner] + index * _BLOCK_ROWS, geometry.num_rows)
    return row_sequence, row_positions, first
