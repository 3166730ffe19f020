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


@dataclass(frozen=True, slots=True)
class Entry:
    """Tokens that a step begins with, int64 [rows], and where it puts what becomes of them, x
    [rows, hidden]."""

    tokens: np.ndarray
    x: Tensor


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
        rows: Tensor | Entry,
        batch: tuple[Opaque, int],
        patches: Sequence[Patch | None],
        step: Callable[[Input, Opaque, Sequence[Patch | None]], Tensor],
        relay: Opaque = None,
    ) -> Tensor | None:
        """Run `step` (over rows, a plan, patches) for a batch: its plan, and a page for padding.
        What it gives: x [rows, hidden], in place or where the entry says; or the best of each row,
        int64 [rows], which lie there until the same is run again. None, and nothing done, if the
        batch is too large. `units` names what `step` computes: equal names, equal steps. `relay`
        takes note of it."""
        ...

    def relay(self) -> "Relay | None":
        """A new relay; None where there is no such thing."""
        ...

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """Forget the steps whose units `keeps` does not want."""
        ...


class Relay(Protocol):
    """The captured steps of one wave, which are noted while they run. The wave that follows runs
    them all at once, as long as no others have run meanwhile, activations lie where they lay and
    the same plans were moved on. `best` are what steps gave that end in the best of each row."""

    best: list[Tensor]

    def close(self) -> bool:
        """Note no more; False: what was noted cannot be run at once."""
        ...

    def run(self, tokens: Sequence[np.ndarray]) -> None:
        """Run the steps again, those that begin with tokens over these, int64 [rows] each."""
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
