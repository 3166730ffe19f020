"""Decode steps that are captured once and replayed over other rows, as the workers ask for it.

`ext.cuda.graphs` captures them as CUDA graphs, `ext.recordings` as lists of native calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ext.ops import Opaque, Patch


@dataclass(slots=True)
class Counts:
    """How often steps were captured, and how often one was replayed."""

    captured: int = 0
    replayed: int = 0


class Replays(Protocol):
    """The captured steps of one device."""

    @property
    def counts(self) -> Counts:
        """How often, so far."""
        ...

    def run(
        self,
        units: tuple[int, ...],
        x: Tensor,
        batch: tuple[Opaque, int],
        patches: Sequence[Patch | None],
        step: Callable[[Tensor, Opaque, Sequence[Patch | None]], None],
    ) -> bool:
        """Run `step` (over rows x, a plan, patches) on x [rows, hidden], in place, for a decode
        batch: its plan, and a page for padding. False, and nothing done, if the batch is too large.
        `units` names what `step` computes: equal names, equal steps."""
        ...

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """Forget the steps whose units `keeps` does not want."""
        ...
