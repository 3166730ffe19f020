"""A step's native calls, noted while they are made, so that one call makes them all again.

While a tape runs, results lie in memory that all tapes take from and that nothing else uses: only
one step runs at a time.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.memory import Arena
from ext.ops import Linear, Opaque, Patch


class Workspace:
    """Float32 memory for results. What a tensor held is free for others once it is dropped, and
    never goes back to the system."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, *shape: int) -> Tensor:
        """A tensor with undefined content."""
        count = math.prod(shape)
        size = 1 << max(4, (count - 1).bit_length())
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else self._arena.take(4 * size)
        lease = memory.view(np.float32)[:count].reshape(shape)
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a call names the patch of one of its linears."""

    call: int
    offset: int
    matrix: Opaque


class Tape:
    """What a step calls, in order; its results have memory for `most` rows. Those between two
    attentions have each their own, since the calls that follow each other there may be run by some
    rows at a time. `slots` are by the `id` of the patches it was given; `layers` and `positions`
    bound the batches that its attention can serve."""

    def __init__(self, workspace: Workspace, most: int) -> None:
        self._workspace = workspace
        self._most = most
        self._held: list[Tensor] = []
        self.calls: list[tuple[native.Replayable, bytes]] = []
        self.slots: dict[int, Slot] = {}
        self.layers = 0
        self.positions = math.inf

    def empty(self, rows: int, *shape: int) -> Tensor:
        """Memory for a result."""
        memory = self._workspace.empty(self._most, *shape)
        self._held.append(memory)
        return memory[:rows]

    def best(self, rows: int) -> Tensor:
        """Memory for the best of each row, int64, which no other step takes."""
        return torch.empty(self._most, dtype=torch.int64)[:rows]

    def attends(self) -> None:
        """Know that attention comes next."""
        self._held.clear()

    def note(self, operation: native.Replayable, record: bytes) -> None:
        """Take in a call."""
        self.calls.append((operation, record))

    def note_patches(self, linears: Sequence[Linear], patches: Sequence[Patch | None]) -> None:
        """Know which patches the next call, a projection, is given."""
        for i, (linear, patch) in enumerate(zip(linears, patches, strict=True)):
            if patch is not None:
                offset = native.PROJECT[i + 1].size - native.POINTER.size
                self.slots[id(patch)] = Slot(len(self.calls), offset, linear.weight)

    def note_bounds(self, layers: int, positions: float) -> None:
        """Know how many attention layers a batch must have, and how many positions it may."""
        self.layers = max(self.layers, layers)
        self.positions = min(self.positions, positions)
