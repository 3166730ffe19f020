"""Attachments of a batch in the form the kernels read: tiles, addresses and row slots.

They are laid out on the host first. A step that runs once has each patch sent by itself; a captured
one has room for all of its patches at fixed addresses (`ext.cuda.graphs`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext.cuda.lora import TILE_ROWS
from ext.cuda.parcel import Parcel, Spec
from ext.ops import LoraSegment, Norm, Patch

# What of a patch decides which kernels are launched: rank and precision of each round, and whether
# rows have slots.
Form = tuple[tuple[tuple[int, torch.dtype], ...], bool]


@dataclass(frozen=True, slots=True)
class Round:
    """Segments of one precision that share no row. `tiles` int32 [n, 3]: segment, first row, rows;
    `pointers` int64 [segments, 2]: A, B; `rank` is the largest, as a power of two from 16 on."""

    tiles: Tensor
    pointers: Tensor
    ranks: Tensor
    scales: Tensor
    rank: int
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return len(self.tiles)


@dataclass(frozen=True, slots=True)
class Slots:
    """Which rows have vectors of their own: `rows` int32 [rows] of slots (0: none); addresses of
    float32 vectors per slot, int64 (0: none)."""

    rows: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A patch on the device, ready for launches."""

    rounds: tuple[Round, ...]
    slots: Slots | None


@dataclass(eq=False, slots=True)
class Draft:
    """A patch laid out on the host: `arrays` are the parts of its rounds, then those of its slots,
    in the order of their fields. `sent` is what `prepared` made of it. What the addresses point at
    is kept by the patch itself."""

    form: Form
    arrays: tuple[np.ndarray, ...]
    sent: Prepared | None = None


def drafted(patch: Patch, rows: int) -> Draft:
    """A patch laid out for `rows` rows: made once and kept in the patch."""
    if patch.prepared is None:
        groups = _groups(patch.segments)
        arrays = [array for group in groups for array in _round(group)]
        if patch.finishes:
            finishes = [(f.first, f.last, f.gain, f.bias) for f in patch.finishes]
            arrays += _slots(finishes, rows)
        rounds = tuple((_padded_rank(group), group[0].a.dtype) for group in groups)
        patch.prepared = Draft((rounds, bool(patch.finishes)), tuple(arrays))
    return patch.prepared


def prepared(patch: Patch, rows: int, device: torch.device) -> Prepared:
    """A patch on the device: a `Prepared` stays as it is, others are sent once."""
    if isinstance(patch.prepared, Prepared):
        return patch.prepared
    draft = drafted(patch, rows)
    if draft.sent is None:
        draft.sent = as_prepared(draft.form, _sent(draft.arrays, device))
    return draft.sent


def prepare_norm(norm: Norm, rows: int, each: int, device: torch.device) -> Slots:
    """Which of `rows` have weights of their own, where a row of the batch is `each` of them."""
    runs = [(n.first * each, n.last * each, n.weight, n.bias) for n in norm.rows]
    return Slots(*_sent(_slots(runs, rows), device))


def room(form: Form, rows: int) -> list[Spec]:
    """Arrays that hold any patch of a form for up to `rows` rows, a segment for each."""
    rounds, slotted = form
    specs: list[Spec] = []
    for _ in rounds:
        specs += [
            ((rows, 3), np.int32),
            ((rows, 2), np.int64),
            ((rows,), np.int32),
            ((rows,), np.float32),
        ]
    if slotted:
        specs += [((rows,), np.int32), ((rows + 1,), np.int64), ((rows + 1,), np.int64)]
    return specs


def as_prepared(form: Form, arrays: Sequence[Tensor]) -> Prepared:
    """Arrays on the device, laid out as in `Draft`, under their names."""
    rounds, slotted = form
    made = tuple(
        Round(*arrays[4 * i : 4 * i + 4], rank=rank, dtype=dtype)
        for i, (rank, dtype) in enumerate(rounds)
    )
    return Prepared(made, Slots(*arrays[-3:]) if slotted else None)


def _sent(arrays: Iterable[np.ndarray], device: torch.device) -> list[Tensor]:
    arrays = list(arrays)
    parcel = Parcel([(array.shape, array.dtype.type) for array in arrays], device)
    for place, array in zip(parcel.inside, arrays, strict=True):
        place[...] = array
    parcel.send()
    return parcel.outside


def _groups(segments: Sequence[LoraSegment]) -> list[list[LoraSegment]]:
    """Segments that can share a launch: no row twice, one precision."""
    groups: list[list[LoraSegment]] = []
    for segment in sorted(segments, key=lambda s: s.first):
        for group in groups:
            if group[-1].last <= segment.first and group[0].a.dtype == segment.a.dtype:
                group.append(segment)
                break
        else:
            groups.append([segment])
    return groups


def _padded_rank(segments: Sequence[LoraSegment]) -> int:
    largest = max(segment.a.shape[0] for segment in segments)
    return max(16, 1 << (largest - 1).bit_length())


def _round(segments: Sequence[LoraSegment]) -> list[np.ndarray]:
    tiles = [
        (index, row, min(TILE_ROWS, segment.last - row))
        for index, segment in enumerate(segments)
        for row in range(segment.first, segment.last, TILE_ROWS)
    ]
    pointers = [(segment.a.data_ptr(), segment.b.data_ptr()) for segment in segments]
    return [
        np.array(tiles, np.int32),
        np.array(pointers, np.int64),
        np.array([segment.a.shape[0] for segment in segments], np.int32),
        np.array([segment.scale for segment in segments], np.float32),
    ]


def _slots(
    runs: Sequence[tuple[int, int, Tensor | None, Tensor | None]], rows: int
) -> list[np.ndarray]:
    owner = np.zeros(rows, np.int32)
    for slot, (first, last, _, _) in enumerate(runs, 1):
        owner[first:last] = slot
    columns = [[0], [0]]
    for _, _, *vectors in runs:
        for column, vector in zip(columns, vectors, strict=True):
            column.append(0 if vector is None else vector.data_ptr())
    return [owner, *(np.array(column, np.int64) for column in columns)]
