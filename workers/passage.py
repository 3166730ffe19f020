"""Units in a row, as the rows of a stage wear them: what carries those rows on.

Made once for an arrangement of rows and kept while it lasts. Decode steps are replayed from a
capture where the kernels have them (`ext.replays.Replays`) and what the rows wear can be exchanged
under it: low-rank pieces, gains and biases of linears. All else runs unit by unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ext.ops import Cache, Opaque, Ops, Patch, Place
from ext.replays import Entry, Input
from workers import layers, vocabulary
from workers.attachments import Worn
from workers.block import AttentionUnit, EmbedUnit, HeadUnit, MlpUnit, ParallelUnit, ResidentUnit
from workers.foreign import ForeignUnit, foreign

_LAYERS = (AttentionUnit, MlpUnit, ParallelUnit)
# A unit as rows wear it, and its attention layer in the chain.
Site: TypeAlias = tuple[ResidentUnit, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A unit as it is held, as rows wear it, and its attention layer in the chain."""

    held: ResidentUnit
    unit: ResidentUnit
    worn: Worn
    layer: int


class Passage:
    """Parts that follow each other; only the first may be an embedding, and only the last a head,
    of which the likeliest tokens are wanted."""

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0]
        self._embed = first if isinstance(first.unit, EmbedUnit) else None
        self._parts = tuple(parts[1:] if self._embed else parts)

    @property
    def embeds(self) -> bool:
        """Whether it begins with tokens."""
        return self._embed is not None

    @cached_property
    def embeds_plainly(self) -> bool:
        """Whether it begins with tokens, and its rows wear nothing upon their embedding."""
        part = self._embed
        return part is not None and part.unit is part.held and not part.worn.embed

    def embed(self, tokens: np.ndarray, at: layers.Context) -> Tensor:
        """The embeddings of tokens int64 [rows] that it begins with: x [rows, hidden]."""
        assert self._embed is not None
        return vocabulary.embed(self._embedding, tokens, self._embed.worn, at)

    def run(self, x: Tensor, at: layers.Context) -> Tensor:
        """Carry x [rows, hidden] through all but the embedding, unit by unit; mostly in place."""
        for site, part in zip(self._sites, self._parts, strict=True):
            x = _pass(site, part.worn, x, at)
        return x

    def logits(self, x: Tensor, at: layers.Context) -> Tensor:
        """What the head that it consists of gives of x [rows, hidden]: [rows, vocabulary]."""
        (part,) = self._parts
        assert isinstance(part.unit, HeadUnit)
        return vocabulary.head(part.unit, x, part.worn, at)

    def write(self, x: Tensor, at: layers.Context) -> None:
        """Only the keys and values of its one part, over x [rows, hidden]."""
        (part,) = self._parts
        unit = part.unit.attention if isinstance(part.unit, ParallelUnit) else part.unit
        assert isinstance(unit, AttentionUnit)
        layers.write(unit, x, part.layer, part.worn, at)

    @cached_property
    def replayable(self) -> bool:
        """Whether a capture of these units, but for an embedding, can serve whatever rows wear upon
        them."""
        return bool(self._parts) and all(map(_is_replayable, self._parts))

    def units(self, rows: Tensor | Entry) -> tuple[int, ...]:
        """Its units as objects, which a capture over such rows keeps."""
        return self._behind if isinstance(rows, Tensor) else self._all

    @cached_property
    def _all(self) -> tuple[int, ...]:
        assert self._embed is not None
        return (id(self._embed.held), *self._behind)

    @cached_property
    def _behind(self) -> tuple[int, ...]:
        return tuple(id(part.held) for part in self._parts)

    @property
    def layer(self) -> int:
        """The attention layer that it begins at."""
        return self._parts[0].layer

    @cached_property
    def patches(self) -> tuple[Patch | None, ...]:
        """What rows wear upon the linears, unit by unit."""
        return tuple(
            part.worn.linears.get(role) for part in self._parts for role in part.unit.linears
        )

    def step(self, rows: Tensor | Entry, ops: Ops, cache: Cache) -> "CapturedStep":
        """What a capture over such rows records."""
        if isinstance(rows, Tensor):
            return CapturedStep(None, self._sites, ops, cache)
        return CapturedStep(self._embedding, self._sites, ops, cache)

    @property
    def _embedding(self) -> EmbedUnit:
        assert self._embed is not None
        assert isinstance(self._embed.unit, EmbedUnit)
        return self._embed.unit

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        return tuple((part.unit, part.layer) for part in self._parts)


@dataclass(frozen=True, slots=True)
class Way:
    """What a stage needs each time that it runs, while its steps stay: its units and what its rows
    wear, which rows these are, the width of what they bring along and of what they leave, whether
    captured steps serve them, and whether these keep to the stream of activations."""

    passage: Passage
    rows: slice | Tensor
    width: int
    result: int
    captured: bool

    @property
    def keeps(self) -> bool:
        return isinstance(self.rows, slice) and self.width == self.result


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """Units over rows of any batch, in front of them an embedding where the rows are tokens: plan
    and patches are the capture's own, so it holds nothing that some rows wore."""

    embed: EmbedUnit | None
    sites: tuple[Site, ...]
    ops: Ops
    cache: Cache

    def __call__(self, rows: Input, plan: Opaque, patches: Sequence[Patch | None]) -> Tensor:
        at = layers.Context(self.ops, self.cache, plan)
        given = iter(patches)
        if isinstance(rows, Tensor):
            x = rows
        else:
            assert self.embed is not None
            x = vocabulary.look_up(self.embed, rows, at)
        for site in self.sites:
            own = {role: next(given) for role in site[0].linears}
            linears = {role: patch for role, patch in own.items() if patch is not None}
            x = _pass(site, Worn(linears, {}, {}), x, at)
        return x


def _is_replayable(part: Part) -> bool:
    """Whether a capture of the unit serves whatever rows wear upon its linears, and they wear
    nothing else."""
    unit, worn = part.unit, part.worn
    if unit is not part.held or worn.gains or worn.detours:
        return False
    if isinstance(unit, HeadUnit):
        return vocabulary.ends_in_best(unit, worn)
    return isinstance(unit, _LAYERS)


def _pass(site: Site, worn: Worn, x: Tensor, at: layers.Context) -> Tensor:
    """One unit over rows x; of a head, the likeliest token of each."""
    unit, layer = site
    match unit:
        case AttentionUnit():
            layers.attention(unit, x, layer, worn, at)
        case MlpUnit():
            layers.mlp(unit, x, worn, at)
        case ParallelUnit():
            layers.parallel(unit, x, layer, worn, at)
        case ForeignUnit():
            foreign(unit, x, worn.linears, at.ops, Place(at.cache, layer, at.plan))
        case HeadUnit():
            return vocabulary.best(unit, x, worn, at)
        case EmbedUnit():
            raise AssertionError("embeddings have a step of their own")
        case _:
            x = layers.stitch(unit, x, worn, at)
    return x
