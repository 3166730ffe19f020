"""Stop strings in streamed text: where an answer ends, and how much may be shown before. Pure."""

from collections.abc import Sequence


class StopFinder:
    """Watches text that arrives in pieces for the first of `stops`.

    The answer ends at the earliest character that completes a stop string; if several end there,
    the longest counts. So the result depends on the text alone, not on how it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in `text`; give back what may be shown, and the stop string if one was found."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = self._first(text)
        if found is not None:
            end, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> tuple[int, str] | None:
        """End and name of the stop string that is complete first."""
        ends = [(at + len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(ends, key=lambda end: (end[0], -len(end[1])), default=None)

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that may yet become a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
