"""A picture of the comparison: one panel per cell, one bar per arrangement, whiskers from the least
to the most of its rounds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.peers.ours import NAME
from bench.result import Result
from bench.spread import median

_COLUMNS = 2
_OURS, _THEIRS = "#1f6f5c", "#b8b8b8"
_WIDTH_IN, _BAR_IN, _PANEL_IN = 13.0, 0.3, 0.9


def draw(results: Sequence[Result], path: Path) -> bool:
    """Write the picture; False if there is nothing to compare."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        if "values" in result.detail:
            panels.setdefault(result.scenario.removeprefix("peers: "), []).append(result)
    if not panels:
        return False
    rows = -(-len(panels) // _COLUMNS)
    most = max(len(bars) for bars in panels.values())
    figure = Figure(figsize=(_WIDTH_IN, rows * (_PANEL_IN + _BAR_IN * most)), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    places = [place for row in axes for place in row]
    for place, (title, bars) in zip(places, panels.items(), strict=False):
        _panel(place, title, bars)
    for place in places[len(panels) :]:
        place.remove()
    figure.savefig(path)
    return True


def _panel(axes: Axes, title: str, bars: Sequence[Result]) -> None:
    values = [bar.detail["values"] for bar in bars]
    middles = [median(many) for many in values]
    whiskers = [
        [middle - min(many) for middle, many in zip(middles, values, strict=True)],
        [max(many) - middle for middle, many in zip(middles, values, strict=True)],
    ]
    colours = [_OURS if bar.cell.startswith(NAME) else _THEIRS for bar in bars]
    drawn = axes.barh([bar.cell for bar in bars], middles, xerr=whiskers, color=colours)
    axes.bar_label(drawn, fmt="%.0f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}, {bars[0].detail['unit']}", loc="left")
