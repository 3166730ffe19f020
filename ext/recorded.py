"""One recorded step: the records of its native calls, and what may be exchanged in them."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.cpu import CpuOps
from ext.ops import Opaque, Patch
from ext.patch import patch_address
from ext.plan import CpuPlan
from ext.replays import Input
from ext.tape import Tape

# Some units over rows, with one patch for each linear of theirs: see `ext.replays.Replays.run`.
Step = Callable[[Input, CpuPlan, Sequence[Patch | None]], Tensor]
Patches = Sequence[Patch | None]


class Inlet:
    """What a step reads that is another's each time, at addresses that stay: `rows`, with room for
    as many as it may have, and its plan."""

    __slots__ = ("plan", "rows")

    def __init__(self, rows: Input) -> None:
        self.rows = rows
        self.plan = native.Record(bytes(native.PLAN.size))

    def put(self, rows: Input, plan: CpuPlan) -> Input:
        """Lay these there; the part of `rows` that they take."""
        native.move(self.plan.address, plan.record)
        if isinstance(self.rows, Tensor):
            assert isinstance(rows, Tensor)
            return self.rows[: len(rows)].copy_(rows)
        own = self.rows[: len(rows)]
        own[:] = rows
        return own


class Recorded:
    """The records of a tape of so many rows, one behind the other, and the `calls` that they belong
    to, as bytes. `result` is what the step gives, with room for the most rows, unless that is what
    it began with. `owner` is the step, which keeps what they point at."""

    def __init__(
        self,
        tape: Tape,
        inlet: Inlet,
        patches: Sequence[Patch],
        rows: int,
        owner: Step,
        result: Tensor | None,
    ) -> None:
        self.layers, self.positions = tape.layers, tape.positions
        self.inlet = inlet
        self._result = inlet.rows if result is None else result
        self._owner = owner
        ends = list(accumulate((len(record) for _, record in tape.calls), initial=0))
        self._records = native.Record(b"".join(record for _, record in tape.calls))
        self._slots: list[tuple[int, Opaque] | None] = [
            None if slot is None else (ends[slot.call] + slot.offset, slot.matrix)
            for slot in (tape.slots.get(id(patch)) for patch in patches)
        ]
        self._loaded: Patches | None = None
        self._least = 0  # rows that these want
        self._given = self._result
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
        self.calls = b"".join(
            native.REPLAYED.pack(native.OPERATIONS[operation], self._records.address + end)
            for (operation, _), end in zip(tape.calls, ends, strict=False)
        )
        self.call = native.replay(self.calls)

    def load(self, patches: Patches, rows: int, ops: CpuOps) -> None:
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

    def check(self, plan: CpuPlan) -> None:
        """Refuse a batch beyond what was recorded."""
        if plan.num_layers < self.layers or plan.num_positions > self.positions:
            raise ValueError(
                f"position {plan.num_positions - 1} of {plan.num_layers} layers lies beyond what"
                " was recorded"
            )

    def given(self, rows: int) -> Tensor:
        """What the step gave of so many rows, where it lies."""
        # Taking a part of a tensor costs as much as what else is done for a replay.
        if len(self._given) != rows:
            self._given = self._result[:rows]
        assert isinstance(self._given, Tensor), "what begins with tokens has a result"
        return self._given

    def forget(self) -> None:
        """Let go of the attachments that were loaded last."""
        self._loaded = None


def is_best(given: Tensor) -> bool:
    """Whether a step gave the best of each row, not activations."""
    return given.dtype is torch.int64
