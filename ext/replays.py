"""Steps that are captured once and replayed over other rows, as the workers ask for it.

`ext.cuda.graphs` captures them as CUDA graphs, `ext.recordings` as lists of native calls.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from ext.ops import Opaque, Patch

# What a step begins with: activations [rows, hidden], or tokens int64 [rows].
Input: TypeAlias = Tensor | np.ndarray


@dataclass(slots=True)
class Counts:
    """How often steps were captured, and how often one was replayed."""

    captured: int = 0
    replayed: int = 0


class Replays(Protocol):
    """The captured steps of one device. `takes_prompts` says whether they serve batches in which a
    sequence has any number of rows, `takes_ends` whether a step may begin with the embedding of
    tokens, and end in the best of each row."""

    takes_prompts: bool
    takes_ends: bool

    @property
    def counts(self) -> Counts:
        """How often, so far."""
        ...

    def run(
        self,
        units: tuple[int, ...],
        rows: Input,
        batch: tuple[Opaque, int],
        patches: Sequence[Patch | None],
        step: Callable[[Input, Opaque, Sequence[Patch | None]], Tensor],
    ) -> Tensor | None:
        """Run `step` (over rows, a plan, patches) for a batch: its plan, and a page for padding.
        What it gives: x [rows, hidden], in place if it began with that, or the best of each row,
        int64 [rows]; what is not in place lies there until the next run. None, and nothing done,
        if the batch is too large. `units` names what `step` computes: equal names, equal steps."""
        ...

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """Forget the steps whose units `keeps` does not want."""
        ...


class Key(Hashable, Protocol):
    """What a captured step is found by."""

    @property
    def units(self) -> tuple[int, ...]: ...


class Captured(Protocol):
    """A step that can be replayed over whatever is loaded into it."""

    def forget(self) -> None:
        """Let go of the attachments that were loaded last."""
        ...


AnyKey = TypeVar("AnyKey", bound=Key)
AnyCaptured = TypeVar("AnyCaptured", bound=Captured)


class Shelf(Generic[AnyKey, AnyCaptured]):
    """The captured steps that are kept: at most `capacity`, the least recently used one leaves."""

    def __init__(self, capacity: int) -> None:
        self.counts = Counts()
        self._capacity = capacity
        self._kept: OrderedDict[AnyKey, AnyCaptured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: AnyKey) -> AnyCaptured | None:
        """The step of that key, about to be used."""
        captured = self._kept.get(key)
        if captured is not None:
            self._kept.move_to_end(key)
        return captured

    def keep(self, key: AnyKey, captured: AnyCaptured) -> None:
        """Take in a step that was just captured."""
        self.counts.captured += 1
        self._kept[key] = captured
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """See `Replays.retain`."""
        for key in [key for key in self._kept if not keeps(key.units)]:
            del self._kept[key]
        for captured in self._kept.values():
            # An adapter that goes must not be held by a step of the base that it was last upon.
            captured.forget()
