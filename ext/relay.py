"""The recorded steps of a wave, one behind the other: one foreign call runs them all again, for the
wave that follows it. So a step's first weights are fetched while the one before it ends."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ext import native
from ext.cpu import CpuOps
from ext.plan import CpuPlan
from ext.recorded import Recorded, is_best
from ext.replays import Counts, Input


class Relay:
    """See `ext.replays.Relay`."""

    def __init__(self, ops: CpuOps, counts: Counts) -> None:
        self.tokens: list[np.ndarray] = []
        self.best: list[Tensor] = []
        self._ops = ops
        self._counts = counts
        self._legs: list[tuple[Recorded, CpuPlan]] = []
        self._calls: list[bytes] = []
        self._held: list[object] = []
        self._call: native.Record | None = None

    def note(self, recorded: Recorded, plan: CpuPlan, rows: Input, x: Tensor) -> None:
        """Take in a step that has run over `rows`; what it made of them, unless that is the best of
        each, was put in `x`."""
        count = len(rows)
        given = recorded.given(count)
        own = recorded.inlet.rows
        if isinstance(rows, Tensor):
            assert isinstance(own, Tensor)
            self._note_copy(rows, own[:count])
        else:
            assert isinstance(own, np.ndarray)
            self.tokens.append(own[:count])
        self._calls.append(recorded.calls)
        if is_best(given):
            self.best.append(given)
        else:
            self._note_copy(given, x)
        self._legs.append((recorded, plan))

    def close(self) -> bool:
        """See `ext.replays.Relay.close`."""
        # What is loaded into a step is there once.
        if len({id(recorded) for recorded, _ in self._legs}) < len(self._legs):
            return False
        self._call = native.replay(b"".join(self._calls))
        return True

    def run(self, tokens: Sequence[np.ndarray]) -> None:
        """See `ext.replays.Relay.run`."""
        assert self._call is not None, "a relay is run before it is closed"
        for recorded, plan in self._legs:
            recorded.check(plan)
        for own, given in zip(self.tokens, tokens, strict=True):
            own[:] = given
        self._ops.replay(self._call)
        self._counts.replayed += len(self._legs)

    def _note_copy(self, source: Tensor, target: Tensor) -> None:
        addresses = source.data_ptr(), target.data_ptr()
        record = native.Record(native.COPY.pack(*addresses, source.numel()))
        self._calls.append(native.REPLAYED.pack(native.OPERATIONS["copy"], record.address))
        self._held += (source, target, record)
