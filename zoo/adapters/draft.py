"""An adapter's effect on its base while it is being worked out: pieces and tensors by unit.

Nothing is stored yet, so pieces name tensors in place of objects: the source's own names, or those
of tensors that were computed here (`derived`). `settle` turns them into digests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from zoo.manifest import (
    Attachment,
    Bias,
    Bottleneck,
    LowRank,
    NormWeights,
    ObjectDigest,
    Piece,
    Prefix,
    SoftPrompt,
    TokenRows,
)
from zoo.sources.values import as_tensor
from zoo.sources.weights import SourceTensor

_OBJECT_FIELDS = (
    *("a", "b", "vector", "weight", "bias", "down", "up", "down_bias", "up_bias"),
    *("keys", "values", "vectors", "ids", "rows"),
)
_NAMES: tuple[tuple[type[msgspec.Struct], str], ...] = (
    (Prefix, "prefix"),
    (SoftPrompt, "prompt"),
    (Bottleneck, "bottleneck"),
    (LowRank, "lora"),
    (TokenRows, "tokens"),
    (NormWeights, "norm"),
    (Bias, "bias"),
)


@dataclass(slots=True)
class Draft:
    """`whole` are tensors in place of a unit's own: role -> name. `vocabulary` is what embedding
    and head have once those took their place."""

    vocabulary: int = 0
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    whole: dict[int, dict[str, str]] = field(default_factory=dict)
    derived: dict[str, SourceTensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it mostly is, where its own type does not say: the first of its pieces' kinds."""
        present = {type(piece) for pieces in self.pieces.values() for piece in pieces}
        return next((name for kind, name in _NAMES if kind in present), "partial")

    def attach(self, unit: int, piece: Piece) -> None:
        """One more piece upon a unit."""
        self.pieces.setdefault(unit, []).append(piece)

    def replace(self, unit: int, role: str, name: str) -> None:
        """A tensor in place of the unit's own."""
        self.whole.setdefault(unit, {})[role] = name

    def derive(self, name: str, values: np.ndarray) -> ObjectDigest:
        """A computed tensor; returns what a piece calls it until it is stored."""
        self.derived[name] = as_tensor(values)
        return ObjectDigest(name)

    def settle(self, unit: int, digests: Mapping[str, ObjectDigest]) -> Attachment | None:
        """The unit's attachment, once `digests` says which object each name became."""
        pieces = self.pieces.get(unit)
        if not pieces:
            return None
        return Attachment(tuple(_settled(p, digests) for p in sorted(pieces, key=_order)))


def _order(piece: Piece) -> tuple[str, str]:
    return type(piece).__name__, getattr(piece, "role", "")


def _settled(piece: Piece, digests: Mapping[str, ObjectDigest]) -> Piece:
    """The piece with objects for names; what already is an object's digest stays."""
    named = {
        name: getattr(piece, name)
        for name in _OBJECT_FIELDS
        if isinstance(getattr(piece, name, None), str)
    }
    found = {name: digests.get(value, value) for name, value in named.items()}
    return msgspec.structs.replace(piece, **found)
