"""Which units of a chain may be swapped for others within one budget for all of them together.

Pure: what a set of swaps does is asked of the caller, who measures the composed chain. Bounds that
hold for each swap alone say nothing about their sum, so none is ever added up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zoo.equivalence.agreement import Agreement


@dataclass(frozen=True, slots=True)
class Budget:
    """What the composed chain has to keep: at least so much agreement, at most so much divergence
    (nats). Judged by the interval's worse end, so that it holds beyond the text at hand."""

    agreement: float
    kl: float | None = None

    def allows(self, measured: Agreement) -> bool:
        """Whether a chain that was measured so may be served."""
        if measured.agreement.low < self.agreement:
            return False
        return self.kl is None or measured.kl.high <= self.kl


@dataclass(slots=True)
class Choice:
    """The swaps that fit the budget together, what the chain with them was measured at (None: none
    was found), and how many chains were measured."""

    places: frozenset[int] = frozenset()
    measured: Agreement | None = None
    attempts: int = 0


@dataclass(slots=True)
class _Search:
    measure: Callable[[frozenset[int]], Agreement]
    budget: Budget
    most: int
    choice: Choice = field(default_factory=Choice)

    def take(self, group: Sequence[int]) -> None:
        """Add the whole group if the chain stays within the budget, else what fits of its halves;
        what comes first in the group is preferred."""
        if not group or self.choice.attempts >= self.most:
            return
        together = self.choice.places | frozenset(group)
        measured = self.measure(together)
        self.choice.attempts += 1
        if self.budget.allows(measured):
            self.choice.places, self.choice.measured = together, measured
        elif len(group) > 1:
            middle = len(group) // 2
            self.take(group[:middle])
            self.take(group[middle:])


def choose(
    order: Sequence[int],
    measure: Callable[[frozenset[int]], Agreement],
    budget: Budget,
    most: int,
) -> Choice:
    """As many of the swaps in `order` (the most promising first) as the budget allows together.
    `measure` says how the chain with a set of swaps agrees; it is asked at most `most` times, and
    what was not asked about is not swapped."""
    search = _Search(measure, budget, most)
    search.take(order)
    return search.choice
