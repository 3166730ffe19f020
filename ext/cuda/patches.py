"""Attachments of a batch in the form the kernels read: tiles, addresses and row slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext.cuda.lora import TILE_ROWS
from ext.cuda.plan import to_device
from ext.ops import LoraSegment, Norm, Patch


@dataclass(frozen=True, slots=True)
class Round:
    """Segments of one precision that share no row. `tiles` int32 [n, 3]: segment, first row, rows;
    `pointers` int64 [segments, 2]: A, B; `rank` is the largest, as a power of two from 16 on."""

    tiles: Tensor
    count: int
    pointers: Tensor
    ranks: Tensor
    scales: Tensor
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Slots:
    """Which rows have vectors of their own: `rows` int32 [rows] of slots (0: none); addresses of
    float32 vectors per slot, int64 (0: none)."""

    rows: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A patch, ready for launches; `keeps` holds the vectors that addresses point at."""

    rounds: tuple[Round, ...]
    slots: Slots | None
    keeps: tuple[object, ...]


def prepared(patch: Patch, rows: int, device: torch.device) -> Prepared:
    """A patch laid out for `rows` rows: made once and kept in the patch."""
    if patch.prepared is None:
        patch.prepared = _prepare(patch, rows, device)
    return patch.prepared


def _prepare(patch: Patch, rows: int, device: torch.device) -> Prepared:
    groups: list[list[LoraSegment]] = []
    for segment in sorted(patch.segments, key=lambda s: s.first):
        for group in groups:
            if group[-1].last <= segment.first and group[0].a.dtype == segment.a.dtype:
                group.append(segment)
                break
        else:
            groups.append([segment])
    finishes = [(f.first, f.last, f.gain, f.bias) for f in patch.finishes]
    slots = _slots(finishes, rows, device) if finishes else None
    return Prepared(
        tuple(_round(group, device) for group in groups), slots, (patch.segments, patch.finishes)
    )


def prepare_norm(norm: Norm, rows: int, each: int, device: torch.device) -> Slots:
    """Which of `rows` have weights of their own, where a row of the batch is `each` of them."""
    runs = [(n.first * each, n.last * each, n.weight, n.bias) for n in norm.rows]
    return _slots(runs, rows, device)


def _round(segments: Sequence[LoraSegment], device: torch.device) -> Round:
    tiles = [
        (index, row, min(TILE_ROWS, segment.last - row))
        for index, segment in enumerate(segments)
        for row in range(segment.first, segment.last, TILE_ROWS)
    ]
    ranks = [segment.a.shape[0] for segment in segments]
    pointers = [(segment.a.data_ptr(), segment.b.data_ptr()) for segment in segments]
    return Round(
        tiles=to_device(np.array(tiles), device),
        count=len(tiles),
        pointers=torch.tensor(pointers, dtype=torch.int64, device=device),
        ranks=to_device(np.array(ranks), device),
        scales=torch.tensor([s.scale for s in segments], dtype=torch.float32, device=device),
        rank=max(16, 1 << (max(ranks) - 1).bit_length()),
        dtype=segments[0].a.dtype,
    )


def _slots(
    runs: Sequence[tuple[int, int, Tensor | None, Tensor | None]], rows: int, device: torch.device
) -> Slots:
    owner = np.zeros(rows, np.int32)
    for slot, (first, last, _, _) in enumerate(runs, 1):
        owner[first:last] = slot
    columns = [[0], [0]]
    for _, _, *vectors in runs:
        for column, vector in zip(columns, vectors, strict=True):
            column.append(0 if vector is None else vector.data_ptr())
    first, second = (torch.tensor(c, dtype=torch.int64, device=device) for c in columns)
    return Slots(to_device(owner, device), first, second)
