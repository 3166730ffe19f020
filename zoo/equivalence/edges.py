"""What was measured between two chains, kept in the catalog: one edge per pair and corpus.

An edge leads from a chain to the one that it became by swaps, both by digest, so replacing a
variant never makes an edge speak of another one.
"""

import contextlib
from pathlib import Path
from typing import Literal

import msgspec

from zoo.catalog import Catalog
from zoo.equivalence.agreement import Agreement
from zoo.equivalence.distance import Distance
from zoo.findings import Findings
from zoo.lock import writing
from zoo.manifest import ChainDigest
from zoo.measured import Interval
from zoo.progress import Progress

KIND = "edge"
Level = Literal["chain", "block", "unit"]


class Edge(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`first` and `last` bound the units of `other` that were put into `one`'s chain, or all of
    them; names are those of the day. `weights` are there where the units have the same tensors,
    and leave out what is attached to them.
    What was measured is against `one` on the held-out text `corpus` (its digest), which was called
    `text`; it is None where the weights lie too far apart to be run. `seed` drew the intervals."""

    level: Level
    one: str
    other: str
    first: int
    last: int
    weights: Distance | None
    corpus: str
    text: str
    sequences: int
    tokens: int
    created: float
    seed: int
    kl: Interval | None = None
    agreement: Interval | None = None
    perplexity_change: Interval | None = None

    def with_measured(self, measured: Agreement) -> "Edge":
        """The edge, once the chain was run."""
        return msgspec.structs.replace(
            self,
            kl=measured.kl,
            agreement=measured.agreement,
            perplexity_change=measured.perplexity_change,
        )

    def of_equals(self) -> "Edge":
        """The edge between chains that are one and the same."""
        none, all_of_it = Interval(0.0, 0.0, 0.0), Interval(1.0, 1.0, 1.0)
        return msgspec.structs.replace(self, kl=none, agreement=all_of_it, perplexity_change=none)


def key_of(one: ChainDigest, became: ChainDigest, corpus: str) -> str:
    """An edge's key among the findings."""
    return f"{one} {became} {corpus}"


class Edges:
    """The edges of a zoo. Each is kept as soon as it is measured, so what was interrupted goes on
    where it stopped."""

    def __init__(self, root: Path, wait_s: float, progress: Progress) -> None:
        self._root = root
        self._wait_s = wait_s
        self._progress = progress

    def get(self, key: str) -> Edge | None:
        """The edge of that key, if it was measured before."""
        with contextlib.closing(Catalog(self._root)) as catalog:
            return Findings(catalog).get(KIND, key, Edge)

    def put(self, key: str, edge: Edge) -> None:
        """Keep an edge. Raises ZooBusy if the lock takes too long."""
        with (
            writing(self._root, self._wait_s, self._progress.say),
            contextlib.closing(Catalog(self._root, writable=True)) as catalog,
        ):
            Findings(catalog).put(KIND, key, edge)
