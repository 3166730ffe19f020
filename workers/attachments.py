"""Attachments of a stage's rows: which rows of the batch get whose pieces, in the kernels' terms.

Rows of one chain lie together, so each variant is one run. What a unit wears depends only on which
chains own which rows; while a batch of the same requests decodes it is made once and reused."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ext.ops import Detour, Finish, LoraSegment, Norm, NormRows, Patch, RowGain
from workers.block import EmbedUnit, ResidentUnit
from workers.pieces import (
    Bias,
    Bypass,
    Gain,
    HeadRows,
    InputGain,
    LowRank,
    NormPair,
    Prefix,
    Reads,
    ResidentAttachment,
)
from workers.wire import ChainId

Rows = tuple[tuple[ChainId, int, int], ...]


class Run(NamedTuple):
    """Rows [first, last) of a stage and what is attached to them."""

    pieces: ResidentAttachment
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Rows [first, last) of a stage and the head's rows that are theirs; `patch` counts from
    `first`."""

    first: int
    last: int
    rows: HeadRows
    patch: Patch | None


@dataclass(frozen=True, slots=True)
class Worn:
    """What the rows of a stage have upon one unit, by the role of a linear: `linears` are patches,
    `gains` go upon the input, `detours` beside the output. Norms of their own are in the unit that
    comes with it. `head` and `embed` are what stands at the two ends of a chain."""

    linears: Mapping[str, Patch]
    gains: Mapping[str, tuple[RowGain, ...]]
    detours: Mapping[str, tuple[tuple[Reads, tuple[Detour, ...]], ...]]
    head: tuple[HeadRun, ...] = ()
    embed: tuple[Run, ...] = ()


NOTHING = Worn({}, {}, {})


class Attachments:
    """The attachments of resident chains, and what was made of them (the newest `capacity`)."""

    def __init__(self, capacity: int = 4096) -> None:
        self._chains: dict[ChainId, Sequence[ResidentAttachment | None]] = {}
        self._made: OrderedDict[tuple[int, ChainId, Rows], tuple[ResidentUnit, Worn]]
        self._made = OrderedDict()
        self._capacity = capacity

    def add(self, chain: ChainId, attachments: Sequence[ResidentAttachment | None]) -> None:
        """Know a chain's attachments, one per unit; a chain without any need not be added."""
        if any(attachments):
            self._chains[chain] = attachments

    def remove(self, chain: ChainId) -> None:
        """Forget a chain; what holds its weights goes too."""
        self._chains.pop(chain, None)
        self._made.clear()

    def select(self, rows: Rows) -> Rows:
        """The runs that have attachments at all."""
        return tuple(run for run in rows if run[0] in self._chains)

    def prefixes(self, chain: ChainId) -> list[Prefix]:
        """The given keys and values of a chain, one for each attention layer, or none."""
        pieces = self._chains.get(chain, ())
        return [prefix for p in pieces if p and (prefix := p.one(Prefix, ""))]

    def dress(
        self, index: int, owner: ChainId, unit: ResidentUnit, rows: Rows
    ) -> tuple[ResidentUnit, Worn]:
        """Unit `index` (as `owner` holds it) with the norms of these rows, and what else they wear;
        `rows` as `select` returned them."""
        if not rows:
            return unit, NOTHING
        key = (index, owner, rows)
        made = self._made.get(key)
        if made is None:
            runs = [
                Run(pieces, first, last)
                for chain, first, last in rows
                if (pieces := self._chains[chain][index]) is not None
            ]
            made = self._made[key] = _dressed(unit, runs) if runs else (unit, NOTHING)
            if len(self._made) > self._capacity:
                self._made.popitem(last=False)
        return made


def _dressed(unit: ResidentUnit, runs: Sequence[Run]) -> tuple[ResidentUnit, Worn]:
    if isinstance(unit, EmbedUnit):
        return unit, Worn({}, {}, {}, embed=tuple(runs))
    # Arranged anew whenever rows come or go: what no variant has is not looked for.
    kinds = {kind for run in runs for kind in run.pieces.kinds}
    roles = tuple(unit.linears)
    gained, passed = (roles if kind in kinds else () for kind in (InputGain, Bypass))
    ends = not kinds.isdisjoint((Gain, Bias))
    worn = Worn(
        linears={role: patch for role in roles if (patch := _patch(role, runs, ends=ends))},
        gains={role: gains for role in gained if (gains := _gains(role, runs))},
        detours={role: detours for role in passed if (detours := _detours(role, runs))},
        head=_head_runs(runs) if HeadRows in kinds else (),
    )
    norms = {
        role: replace(norm, rows=own)
        for role, norm in (unit.norms.items() if NormPair in kinds else ())
        if (own := _norm_rows(role, norm, runs))
    }
    return (unit.with_norms(norms) if norms else unit), worn


def _patch(role: str, runs: Sequence[Run], *, ends: bool) -> Patch | None:
    segments = [
        _segment(low, first, last)
        for pieces, first, last in runs
        for low in pieces.all(LowRank, role)
    ]
    finishes: list[Finish] = []
    for pieces, first, last in runs if ends else ():
        gain, bias = pieces.one(Gain, role), pieces.one(Bias, role)
        if gain or bias:
            finishes.append(Finish(first, last, gain and gain.vector, bias and bias.vector))
    return Patch(tuple(segments), tuple(finishes)) if segments or finishes else None


def _segment(low: LowRank, first: int, last: int) -> LoraSegment:
    return LoraSegment(first, last, low.a, low.b, low.scale, low.prepared)


def _gains(role: str, runs: Sequence[Run]) -> tuple[RowGain, ...]:
    return tuple(
        RowGain(first, last, gain.vector)
        for pieces, first, last in runs
        if (gain := pieces.one(InputGain, role))
    )


def _detours(role: str, runs: Sequence[Run]) -> tuple[tuple[Reads, tuple[Detour, ...]], ...]:
    """Bottleneck adapters by what they read."""
    found: dict[Reads, list[Detour]] = {}
    for pieces, first, last in runs:
        if side := pieces.one(Bypass, role):
            detour = Detour(first, last, side.down, side.up, side.activation, side.scale)
            found.setdefault(side.reads, []).append(detour)
    return tuple((reads, tuple(detours)) for reads, detours in found.items())


def _norm_rows(role: str, norm: Norm, runs: Sequence[Run]) -> tuple[NormRows, ...]:
    return tuple(
        NormRows(first, last, own.weight, norm.bias if own.bias is None else own.bias)
        for pieces, first, last in runs
        if (own := pieces.one(NormPair, role))
    )


def _head_runs(runs: Sequence[Run]) -> tuple[HeadRun, ...]:
    found: list[HeadRun] = []
    for pieces, first, last in runs:
        rows = pieces.one(HeadRows, "head")
        if rows is None:
            continue
        count = last - first
        segments = tuple(_segment(low, 0, count) for low in rows.low_rank)
        ends = rows.gain is not None or rows.bias is not None
        finishes = (Finish(0, count, rows.gain, rows.bias),) if ends else ()
        patch = Patch(segments, finishes) if segments or finishes else None
        found.append(HeadRun(first, last, rows, patch))
    return tuple(found)
