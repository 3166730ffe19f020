"""How well rows of different variants met in the blocks they share: a worker's reports, compared.
Pure."""

from collections.abc import Sequence
from typing import Any

import msgspec


class Merging(msgspec.Struct, frozen=True):
    """Means over the runs of blocks between two reports, each block weighted by its units.

    `rows` and `sequences` are the batch of a run, `merged` the share of runs that carried rows of
    several variants. Shared blocks are those that more than one variant uses.
    """

    rows: float
    sequences: float
    shared_sequences: float
    merged: float


def difference(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each block did in between: entries of a status's `blocks`, counts subtracted."""
    known = {(block["worker"], block["digest"]): block for block in before}
    changes: list[dict[str, Any]] = []
    for block in after:
        old = known.get((block["worker"], block["digest"]), {})
        counts = {
            name: block[name] - old.get(name, 0)
            for name in ("runs", "rows", "sequences", "merged_runs")
        }
        if counts["runs"]:
            place = {name: block[name] for name in ("first", "units", "chains")}
            counts["mean_rows"] = counts["rows"] / counts["runs"]
            counts["mean_sequences"] = counts["sequences"] / counts["runs"]
            changes.append(place | counts)
    return changes


def merging(changes: Sequence[dict[str, Any]]) -> Merging:
    """The means over all blocks that ran."""
    shared = [block for block in changes if block["chains"] > 1]
    return Merging(
        rows=_mean(changes, "rows"),
        sequences=_mean(changes, "sequences"),
        shared_sequences=_mean(shared, "sequences"),
        merged=_mean(shared, "merged_runs"),
    )


def _mean(blocks: Sequence[dict[str, Any]], name: str) -> float:
    runs = sum(block["units"] * block["runs"] for block in blocks)
    return sum(block["units"] * block[name] for block in blocks) / runs if runs else 0.0
