"""Progress on a person's screen: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_LINE_EVERY_S = 10.0


class ConsoleProgress:
    """A `zoo.progress.Progress` on a rich console, meant for stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Go through `items` with a bar that vanishes at the end, or with sparse lines."""
        if self._console.is_terminal:
            return self._with_bar(items, label)
        return self._with_lines(items, label)

    def _with_bar(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield from progress.track(items, description=label)

    def _with_lines(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last >= _LINE_EVERY_S:
                self.say(f"{label}: {done} of {len(items)}")
                last = time.monotonic()
            yield item
