"""How much of a zoo fits into a memory: which variants, what each adds, what is left for KV.

Pure. Every distinct tensor counts once, at the size it is served in; keys and values are set aside
first. Variants are taken cheapest first, given those already taken, which is the order in which
most of them fit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from zoo.manifest import ObjectDigest


@dataclass(frozen=True, slots=True)
class Resident:
    """A variant as memory sees it: its tensors, and the bytes of keys and values per position."""

    name: str
    tensors: frozenset[ObjectDigest]
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is served at once: `sequences` of `context` positions each, in `memory_bytes`."""

    memory_bytes: int
    context: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Prospect:
    """A variant that is not there yet: what its own tensors would weigh."""

    kind: str
    own_bytes: int


class FitRow(msgspec.Struct, frozen=True):
    """A line of `fit`. `adds_bytes`: upon the lines above; `total_bytes`: with them; `frees_bytes`:
    what memory gets back when this one alone leaves; `left_bytes`: for more keys and values."""

    name: str
    adds_bytes: int
    total_bytes: int
    frees_bytes: int
    left_bytes: int
    fits: bool


class Addition(msgspec.Struct, frozen=True):
    """What one more variant of a kind would add, and how many like it fit beside all others."""

    kind: str
    adds_bytes: int
    fits: int


class Fit(msgspec.Struct, frozen=True):
    """`fit`. `kv_bytes` are set aside for the load; `left_bytes` are what the variants that fit
    leave, enough for so many `more_sequences` of the same length."""

    memory_bytes: int
    context: int
    sequences: int
    kv_bytes: int
    weights_bytes: int
    left_bytes: int
    more_sequences: int
    fitting: int
    variants: list[FitRow]
    addition: Addition | None = None


def fit(
    residents: Sequence[Resident],
    sizes: Mapping[ObjectDigest, int],
    load: Load,
    prospect: Prospect | None = None,
) -> Fit:
    """What fits; `sizes` has every tensor's bytes."""
    sequence_bytes = load.context * max((one.kv_bytes for one in residents), default=0)
    kv_bytes = load.sequences * sequence_bytes
    users = Counter(tensor for one in residents for tensor in one.tensors)
    rows: list[FitRow] = []
    total = 0
    for one, adds in _cheapest_first(residents, sizes):
        total += adds
        left = load.memory_bytes - kv_bytes - total
        own = (tensor for tensor in one.tensors if users[tensor] == 1)
        rows.append(FitRow(one.name, adds, total, _bytes(own, sizes), max(left, 0), left >= 0))
    fitting = [row for row in rows if row.fits]
    weights = fitting[-1].total_bytes if fitting else 0
    left = max(load.memory_bytes - kv_bytes - weights, 0)
    return Fit(
        memory_bytes=load.memory_bytes,
        context=load.context,
        sequences=load.sequences,
        kv_bytes=kv_bytes,
        weights_bytes=weights,
        left_bytes=left,
        more_sequences=left // sequence_bytes if sequence_bytes else 0,
        fitting=len(fitting),
        variants=rows,
        addition=prospect and _addition(prospect, left if len(fitting) == len(rows) else 0),
    )


def _addition(prospect: Prospect, left: int) -> Addition:
    return Addition(prospect.kind, prospect.own_bytes, left // max(prospect.own_bytes, 1))


def _cheapest_first(
    residents: Sequence[Resident], sizes: Mapping[ObjectDigest, int]
) -> list[tuple[Resident, int]]:
    """Each resident with what it adds to those before it."""
    wanting: dict[ObjectDigest, list[str]] = {}
    for one in residents:
        for tensor in one.tensors:
            wanting.setdefault(tensor, []).append(one.name)
    waiting = {one.name: one for one in residents}
    adds = {one.name: _bytes(one.tensors, sizes) for one in residents}
    order: list[tuple[Resident, int]] = []
    while waiting:
        name = min(waiting, key=lambda name: (adds[name], name))
        order.append((waiting.pop(name), adds[name]))
        # What has come in costs nobody else anything any more.
        for tensor in order[-1][0].tensors:
            for other in wanting.pop(tensor, ()):
                adds[other] -= sizes[tensor]
    return order


def _bytes(tensors: Iterable[ObjectDigest], sizes: Mapping[ObjectDigest, int]) -> int:
    return sum(sizes[tensor] for tensor in tensors)
