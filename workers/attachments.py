"""Attachments of a stage's rows as patches: which rows of the batch get whose low-rank pieces.

Rows of one chain lie together, so each variant is one segment. The patches of a unit depend only on
which chains own which rows; while a batch of the same requests decodes they are made once and
reused."""

from collections import OrderedDict
from collections.abc import Sequence

from ext.ops import LoraSegment, Patch
from workers.block import (
    AttentionUnit,
    EmbedUnit,
    HeadUnit,
    MlpUnit,
    ParallelUnit,
    ResidentAttachment,
    ResidentUnit,
)
from workers.wire import ChainId

Rows = tuple[tuple[ChainId, int, int], ...]
Patches = tuple[Patch | None, ...]


class Attachments:
    """The attachments of resident chains, and the patches made of them (the newest `capacity`)."""

    def __init__(self, capacity: int = 4096) -> None:
        self._chains: dict[ChainId, Sequence[ResidentAttachment | None]] = {}
        self._made: OrderedDict[tuple[int, Rows], Patches] = OrderedDict()
        self._capacity = capacity

    def add(self, chain: ChainId, attachments: Sequence[ResidentAttachment | None]) -> None:
        """Know a chain's attachments, one per unit; a chain without any need not be added."""
        if any(attachments):
            self._chains[chain] = attachments

    def remove(self, chain: ChainId) -> None:
        """Forget a chain; patches that hold its weights go too."""
        if self._chains.pop(chain, None) is not None:
            self._made.clear()

    def select(self, rows: Rows) -> Rows:
        """The runs that have attachments at all."""
        return tuple(run for run in rows if run[0] in self._chains)

    def patches(self, index: int, unit: ResidentUnit, rows: Rows) -> Patches:
        """Patches for each linear of unit `index`, in the order in which `workers.layers` wants
        them; `rows` as `select` returned them."""
        roles = roles_of(unit)
        if not rows:
            return (None,) * len(roles)
        key = (index, rows)
        made = self._made.get(key)
        if made is None:
            pieces = [(self._chains[c][index], first, last) for c, first, last in rows]
            made = tuple(_patch(role, pieces) for role in roles)
            self._made[key] = made
            if len(self._made) > self._capacity:
                self._made.popitem(last=False)
        return made


def roles_of(unit: ResidentUnit) -> tuple[str, ...]:
    """The linears of a unit that can carry attachments, inputs first, the output last; of a
    parallel unit, the attention's before the MLP's."""
    match unit:
        case AttentionUnit():
            return (*unit.roles, "o")
        case MlpUnit():
            return (*unit.roles, "down")
        case ParallelUnit():
            return (*roles_of(unit.attention), *roles_of(unit.mlp))
        case HeadUnit():
            return ("head",)
        case EmbedUnit():
            return ()


def _patch(role: str, pieces: Sequence[tuple[ResidentAttachment | None, int, int]]) -> Patch | None:
    segments: list[LoraSegment] = []
    for attachment, first, last in pieces:
        low = attachment.get(role) if attachment else None
        if low is not None:
            segments.append(LoraSegment(first, last, low.a, low.b, low.scale))
    return Patch(tuple(segments)) if segments else None
