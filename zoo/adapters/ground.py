"""What an adapter is put upon: its base's family, and the spec and the tensors of each unit."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from zoo.errors import BadAdapter
from zoo.families.family import HEAD, TOKENS, Family, Place
from zoo.manifest import AttentionSpec, HeadSpec, MlpSpec, ObjectDigest, ParallelSpec, Spec, Unit
from zoo.sources.values import read_values
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Ground:
    """The base `name`; `shapes` are those of its units' tensors, by role."""

    name: str
    family: Family
    units: tuple[Unit, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    store: Store

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The arithmetic of each unit."""
        return tuple(unit.spec for unit in self.units)

    @property
    def num_layers(self) -> int:
        """Transformer layers of the base."""
        return self.family.num_layers(len(self.units))

    @property
    def head(self) -> int:
        """The last unit."""
        return len(self.units) - 1

    @property
    def hidden(self) -> int:
        """The width of the stream between units."""
        spec = self.units[-1].spec
        assert isinstance(spec, HeadSpec)
        return spec.hidden

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one table."""
        return self.units[0].tensors[TOKENS] == self.units[-1].tensors[HEAD]

    def module(self, source: str, path: str) -> Place:
        """Where a module's path leads; raises BadAdapter for one that the base does not have."""
        place = self.family.module(path, self.num_layers)
        if place is None or f"{place.role}.weight" not in self.shapes[place.unit]:
            raise self.stranger(source, path)
        return place

    def is_transposed(self, unit: int) -> bool:
        """Whether the unit's matrices lie as [in, out]."""
        spec = self.units[unit].spec
        return isinstance(spec, AttentionSpec | MlpSpec | ParallelSpec) and spec.transposed

    def widths(self, place: Place) -> tuple[int, int]:
        """(in, out) of a linear layer; of the embedding: (tokens, hidden)."""
        shape = self.shapes[place.unit][f"{place.role}.weight"]
        if place.role == "tokens" or self.is_transposed(place.unit):
            return shape[0], shape[1]
        return shape[1], shape[0]

    def values(self, unit: int, role: str) -> np.ndarray | None:
        """A tensor of the base in float32, as it is stored; None if there is none."""
        digest = self.units[unit].tensors.get(role)
        return None if digest is None else read_values(self.store.tensor(digest))

    def matrix(self, place: Place) -> np.ndarray:
        """A linear layer's weight as float32 [out, in]."""
        values = self.values(place.unit, f"{place.role}.weight")
        assert values is not None, "`module` has seen it"
        return values.T if self.is_transposed(place.unit) else values

    def digest(self, unit: int, role: str) -> ObjectDigest | None:
        """The object of one of the base's tensors."""
        return self.units[unit].tensors.get(role)

    def stranger(self, source: str, path: str) -> BadAdapter:
        """The refusal of what this base does not have."""
        return BadAdapter(
            f"{source} changes {path!r}, which {self.name!r} (a {self.family.name} of "
            f"{self.num_layers} layers) does not have: was it made for another base?"
        )

    def misfit(self, source: str, name: str, found: tuple[int, ...], wanted: str) -> BadAdapter:
        """The refusal of a tensor whose shape is another base's."""
        return BadAdapter(
            f"tensor {name!r} of {source} has the shape {list(found)}, but {self.name!r} asks for "
            f"{wanted}: was it made for another base?"
        )
