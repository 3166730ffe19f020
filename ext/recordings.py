"""Steps recorded as lists of native calls: one foreign call runs a step again.

A recorded step reads activations or tokens, a plan and patches at addresses that stay; each replay
puts those of its batch there, and the number of its rows into the records. Recordings have room for
a power of two of rows, are made when first wanted, and leave by least recent use.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from torch import Tensor

from ext import native
from ext.cpu import CpuOps
from ext.ops import Opaque, Patch
from ext.patch import patch_address
from ext.plan import CpuPlan
from ext.replays import Counts, Input, Shelf
from ext.tape import Tape, Workspace

# Some units over rows, with one patch for each linear of theirs: see `ext.replays.Replays.run`.
Step = Callable[[Input, CpuPlan, Sequence[Patch | None]], Tensor]


@dataclass(frozen=True, slots=True)
class _Key:
    units: tuple[int, ...]
    most: int  # rows


class _Recorded:
    """The records of a tape of so many rows, one behind the other, and the call that names them
    all. `result` is what the step gives, with room for the most rows, unless that is what it began
    with. `owner` is the step, which keeps what they point at."""

    def __init__(
        self,
        tape: Tape,
        patches: Sequence[Patch],
        rows: int,
        owner: Step,
        result: Tensor | None,
    ) -> None:
        self.layers, self.positions = tape.layers, tape.positions
        self._result = result
        self._owner = owner
        ends = list(accumulate((len(record) for _, record in tape.calls), initial=0))
        self._records = native.Record(b"".join(record for _, record in tape.calls))
        self._slots: list[tuple[int, Opaque] | None] = [
            None if slot is None else (ends[slot.call] + slot.offset, slot.matrix)
            for slot in (tape.slots.get(id(patch)) for patch in patches)
        ]
        self._loaded: Sequence[Patch | None] | None = None
        self._least = 0  # rows that these want
        self._given = result
        # The counts that grow with the rows: where they stand, and how much there is of a row.
        fields = [
            (end + native.COUNTS[operation]) // 8
            for (operation, _), end in zip(tape.calls, ends, strict=False)
            if operation in native.COUNTS
        ]
        self._numbers = np.frombuffer(memoryview(self._records.data), np.int64)
        self._fields = np.array(fields, np.int64)
        self._of_a_row = self._numbers[self._fields] // rows
        self._rows = rows
        calls = (
            native.REPLAYED.pack(native.OPERATIONS[operation], self._records.address + end)
            for (operation, _), end in zip(tape.calls, ends, strict=False)
        )
        self.call = native.Record(native.REPLAY.pack(len(tape.calls)) + b"".join(calls))

    def load(self, patches: Sequence[Patch | None], rows: int, ops: CpuOps) -> None:
        """Let there be so many rows, and the linears have these patches."""
        if rows != self._rows:
            self._numbers[self._fields] = self._of_a_row * rows
            self._rows = rows
        # A caller keeps its patches while the same rows decode.
        if patches is self._loaded and rows >= self._least:
            return
        self._loaded = None
        for slot, patch in zip(self._slots, patches, strict=True):
            if slot is not None:
                offset, matrix = slot
                address = patch_address(patch, rows, matrix, ops.packing)
                native.POINTER.pack_into(self._records.data, offset, address)
        self._loaded = patches
        prepared = (patch.prepared for patch in patches if patch is not None)
        self._least = max((one.rows for one in prepared if one is not None), default=0)

    def given(self, rows: int) -> Tensor | None:
        """What the step gave of so many rows; None: what it began with."""
        # Taking a part of a tensor costs as much as what else is done for a replay.
        if self._given is not None and len(self._given) != rows:
            assert self._result is not None
            self._given = self._result[:rows]
        return self._given

    def forget(self) -> None:
        """Let go of the attachments that were loaded last."""
        self._loaded = None


class Recordings:
    """Recorded steps over some kernels; at most `capacity` of them are kept. See
    `ext.replays.Replays`."""

    takes_prompts = takes_ends = True

    def __init__(self, ops: CpuOps, capacity: int = 256) -> None:
        self.ops = ops
        self._shelf: Shelf[_Key, _Recorded] = Shelf(capacity)
        self._workspace = Workspace()
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._tokens: dict[int, np.ndarray] = {}
        self._plan = native.Record(bytes(native.PLAN.size))

    def __len__(self) -> int:
        return len(self._shelf)

    @property
    def counts(self) -> Counts:
        """See `ext.replays.Replays.counts`."""
        return self._shelf.counts

    def run(
        self,
        units: tuple[int, ...],
        rows: Input,
        batch: tuple[CpuPlan, int],
        patches: Sequence[Patch | None],
        step: Step,
    ) -> Tensor:
        """See `ext.replays.Replays.run`."""
        count, (plan, _) = len(rows), batch
        ctypes.memmove(self._plan.address, plan.record.address, native.PLAN.size)
        key = _Key(units, 1 << (count - 1).bit_length())
        own = self._put(rows, key.most)
        recorded = self._shelf.find(key)
        if recorded is None:
            recorded = self._record(own, key.most, replace(plan, record=self._plan), patches, step)
            self._shelf.keep(key, recorded)
        else:
            if plan.num_layers < recorded.layers or plan.num_positions > recorded.positions:
                raise ValueError(
                    f"position {plan.num_positions - 1} of {plan.num_layers} layers lies beyond"
                    " what was recorded"
                )
            recorded.load(patches, count, self.ops)
            self.ops.replay(recorded.call)
            self.counts.replayed += 1
        given = recorded.given(count)
        if given is not None:
            return given
        assert isinstance(rows, Tensor)
        assert isinstance(own, Tensor)
        return rows.copy_(own)

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """See `ext.replays.Replays.retain`."""
        self._shelf.retain(keeps)

    def _record(
        self, rows: Input, most: int, plan: CpuPlan, patches: Sequence[Patch | None], step: Step
    ) -> _Recorded:
        """Run a step, noting what it calls, with room for so many rows. Each linear has a patch of
        its own meanwhile, so that its place is known."""
        own = [Patch((), ()) if patch is None else replace(patch) for patch in patches]
        with self.ops.taped(self._workspace, most) as tape:
            given = step(rows, plan, own)
        for patch, other in zip(patches, own, strict=True):
            if patch is not None:
                patch.prepared = other.prepared
        # The tape has room for more rows behind those of the first batch.
        room = (most, *given.shape[1:])
        result = None if given is rows else given.as_strided(room, given.stride())
        recorded = _Recorded(tape, own, len(rows), step, result)
        recorded.load(patches, len(rows), self.ops)
        return recorded

    def _put(self, rows: Input, most: int) -> Input:
        """Rows at an address that stays, with room for so many."""
        if isinstance(rows, Tensor):
            hidden = rows.shape[1]
            if (most, hidden) not in self._streams:
                self._streams[most, hidden] = self._workspace.empty(most, hidden)
            return self._streams[most, hidden][: len(rows)].copy_(rows)
        if most not in self._tokens:
            self._tokens[most] = np.empty(most, np.int64)
        own = self._tokens[most][: len(rows)]
        own[:] = rows
        return own
