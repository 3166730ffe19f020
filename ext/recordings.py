"""Steps recorded as lists of native calls: one foreign call runs a step again.

A recorded step reads activations or tokens, a plan and patches at addresses that stay; each replay
puts those of its batch there, and the number of its rows into the records. Recordings have room for
a power of two of rows, are made when first wanted, and leave by least recent use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ext.cpu import CpuOps
from ext.ops import Patch
from ext.plan import CpuPlan
from ext.recorded import Inlet, Patches, Recorded, Step, is_best
from ext.relay import Relay
from ext.replays import Counts, Entry, Input, Shelf
from ext.tape import Workspace


@dataclass(frozen=True, slots=True)
class _Key:
    units: tuple[int, ...]
    most: int  # rows


class Recordings:
    """Recorded steps over some kernels; at most `capacity` of them are kept. See
    `ext.replays.Replays`."""

    takes_prompts = takes_ends = True

    def __init__(self, ops: CpuOps, capacity: int = 256) -> None:
        self.ops = ops
        self._shelf: Shelf[_Key, Recorded] = Shelf(capacity)
        self._workspace = Workspace()
        self._streams: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._shelf)

    @property
    def counts(self) -> Counts:
        """See `ext.replays.Replays.counts`."""
        return self._shelf.counts

    def run(
        self,
        units: tuple[int, ...],
        rows: Tensor | Entry,
        batch: tuple[CpuPlan, int],
        patches: Patches,
        step: Step,
        relay: Relay | None = None,
    ) -> Tensor:
        """See `ext.replays.Replays.run`."""
        begins, x = (rows.tokens, rows.x) if isinstance(rows, Entry) else (rows, rows)
        count, (plan, _) = len(begins), batch
        key = _Key(units, 1 << (count - 1).bit_length())
        recorded = self._shelf.find(key)
        if recorded is None:
            recorded = self._record(begins, key.most, plan, patches, step)
            self._shelf.keep(key, recorded)
        else:
            recorded.check(plan)
            recorded.inlet.put(begins, plan)
            recorded.load(patches, count, self.ops)
            self.ops.replay(recorded.call)
            self.counts.replayed += 1
        given = recorded.given(count)
        if relay is not None:
            relay.note(recorded, plan, begins, x)
        return given if is_best(given) else x.copy_(given)

    def relay(self) -> Relay:
        """See `ext.replays.Replays.relay`."""
        return Relay(self.ops, self.counts)

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """See `ext.replays.Replays.retain`."""
        self._shelf.retain(keeps)

    def _record(
        self, rows: Input, most: int, plan: CpuPlan, patches: Patches, step: Step
    ) -> Recorded:
        """Run a step, noting what it calls, with room for so many rows. Each linear has a patch of
        its own meanwhile, so that its place is known."""
        inlet = self._inlet(rows, most)
        began = inlet.put(rows, plan)
        own = [Patch((), ()) if patch is None else replace(patch) for patch in patches]
        with self.ops.taped(self._workspace, most) as tape:
            given = step(began, replace(plan, record=inlet.plan), own)
        for patch, other in zip(patches, own, strict=True):
            if patch is not None:
                patch.prepared = other.prepared
        # The tape has room for more rows behind those of the first batch.
        room = (most, *given.shape[1:])
        result = None if given is began else given.as_strided(room, given.stride())
        recorded = Recorded(tape, inlet, own, len(rows), step, result)
        recorded.load(patches, len(rows), self.ops)
        return recorded

    def _inlet(self, rows: Input, most: int) -> Inlet:
        """Where a step reads so many rows: activations where all such steps do."""
        if not isinstance(rows, Tensor):
            return Inlet(np.empty(most, np.int64))
        hidden = rows.shape[1]
        if (most, hidden) not in self._streams:
            self._streams[most, hidden] = self._workspace.empty(most, hidden)
        return Inlet(self._streams[most, hidden])
