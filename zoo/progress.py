"""How long jobs of the zoo tell how far they are; the command line decides what that looks like."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """What a long job calls."""

    def say(self, text: str) -> None:
        """A remark, one line."""
        ...

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Go through `items` while showing how many are done."""
        ...


class Quiet:
    """Shows nothing: for tests and for callers with a display of their own."""

    def say(self, text: str) -> None:
        """Drop the remark."""
        del text

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Go through `items`."""
        del label
        return iter(items)
