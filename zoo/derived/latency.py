"""From measured steps of a block to the time of any step: linear between points of a grid. Pure.

A step of a block costs what its weights and rows cost, and what its rows read of keys and values:
both grow linearly between neighbouring points, and the points stand where kernels change their way.
"""

from bisect import bisect_right
from collections.abc import Sequence
from statistics import median

import msgspec


class Point(msgspec.Struct, frozen=True):
    """A step: `batch` sequences of one row each, of which each sees `context` positions; or a
    prompt of `batch` rows, where `context` is 0."""

    batch: int
    context: int
    seconds: float


class Fit(msgspec.Struct, frozen=True):
    """How far predictions are off at points that they were not made from, as shares of what was
    measured there."""

    median: float
    largest: float
    points: int


class Grid(msgspec.Struct, frozen=True):
    """A full grid of points, points between that check it, and how far it is off there."""

    points: tuple[Point, ...]
    held_out: tuple[Point, ...]
    error: Fit

    def predict(self, batch: int, context: int = 0) -> float:
        """Seconds of a step."""
        return predict(self.points, batch, context)


def grid_of(points: Sequence[Point], held_out: Sequence[Point]) -> Grid:
    """A grid with its error."""
    return Grid(tuple(points), tuple(held_out), fit(points, held_out))


def predict(points: Sequence[Point], batch: int, context: int) -> float:
    """Seconds of a step from a full grid of points; beyond its edges the last slope goes on, and
    never below zero."""
    known = {(point.batch, point.context): point.seconds for point in points}
    batches = sorted({point.batch for point in points})
    contexts = sorted({point.context for point in points})
    lines = [_line(contexts, [known[at, seen] for seen in contexts], context) for at in batches]
    return max(0.0, _line(batches, lines, batch))


def fit(points: Sequence[Point], held_out: Sequence[Point]) -> Fit:
    """The error at points that were measured and left out of the grid."""
    errors = sorted(
        abs(predict(points, one.batch, one.context) - one.seconds) / one.seconds for one in held_out
    )
    if not errors:
        return Fit(0.0, 0.0, 0)
    return Fit(median(errors), errors[-1], len(errors))


def _line(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """Linear between neighbours, on along the last slope outside."""
    if len(places) == 1:
        return values[0]
    right = min(max(bisect_right(places, at), 1), len(places) - 1)
    left = right - 1
    share = (at - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])
