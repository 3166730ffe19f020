"""How far apart the weights of two units lie: the cheap filter before anything is run."""

import math
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from zoo.manifest import Unit
from zoo.store import Store, StoredTensor

_SLICE_ITEMS = 1 << 20


class Distance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of tensors taken together: the cosine of the angle between them, and the norm of the
    difference over that of the first. 1 and 0 for equal ones."""

    cosine: float
    relative: float


class Sums(msgspec.Struct):
    """Sums of squares and of products of two tensors' elements; they add up over tensors."""

    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    difference: float = 0.0

    def add(self, other: "Sums") -> None:
        """Take in what another pair of tensors has."""
        self.first += other.first
        self.second += other.second
        self.product += other.product
        self.difference += other.difference

    def distance(self) -> Distance:
        """What the sums come to."""
        if not self.difference:
            return Distance(1.0, 0.0)
        norms = math.sqrt(self.first) * math.sqrt(self.second)
        cosine = self.product / norms if norms else 0.0
        relative = math.sqrt(self.difference / self.first) if self.first else math.inf
        return Distance(max(-1.0, min(1.0, cosine)), min(relative, 1e300))


def unit_sums(store: Store, one: Unit, two: Unit) -> dict[str, Sums] | None:
    """By role; None where the units do not have the same tensors in the same shapes."""
    if one.tensors.keys() != two.tensors.keys():
        return None
    found: dict[str, Sums] = {}
    for role, digest in one.tensors.items():
        pair = store.tensor(digest), store.tensor(two.tensors[role])
        if pair[0].shape != pair[1].shape:
            return None
        found[role] = _equal(pair[0]) if digest == two.tensors[role] else _sums(*pair)
    return found


def together(sums: Mapping[str, Sums]) -> Distance:
    """Of several tensors as one."""
    total = Sums()
    for one in sums.values():
        total.add(one)
    return total.distance()


def _equal(stored: StoredTensor) -> Sums:
    total = Sums()
    for part in _slices(stored):
        square = float(part @ part)
        total.add(Sums(square, square, square, 0.0))
    return total


def _sums(one: StoredTensor, two: StoredTensor) -> Sums:
    total = Sums()
    for here, there in zip(_slices(one), _slices(two), strict=True):
        change = there - here
        total.add(
            Sums(
                float(here @ here),
                float(there @ there),
                float(here @ there),
                float(change @ change),
            )
        )
    return total


def _slices(stored: StoredTensor) -> Iterator[np.ndarray]:
    """Elements as float64, some at a time."""
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}[stored.dtype]
    values = np.frombuffer(stored.data, kind)
    for start in range(0, len(values), _SLICE_ITEMS):
        part = values[start : start + _SLICE_ITEMS]
        if stored.dtype == "BF16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        yield part.astype(np.float64)
