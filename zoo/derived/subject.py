"""A variant as the thing that something is made from: its manifests and its weights."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.catalog import Catalog, name_taken
from zoo.derived.network import Network, read_network
from zoo.errors import UnknownVariant, UnsupportedFamily
from zoo.learning.train import is_bfloat16_fast
from zoo.manifest import ChainDigest, Manifests, Unit, UnitDigest, Variant
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Subject:
    """A variant without attachments, with its units, bottom first."""

    store: Store
    variant: Variant
    units: tuple[Unit, ...]
    digests: tuple[UnitDigest, ...]

    @property
    def manifests(self) -> Manifests:
        """What the door loads."""
        return manifests_of(self.digests, self.units, self.variant.context)

    def network(self, dtype: torch.dtype) -> Network:
        """Its weights in memory."""
        return read_network(self.store, self.units, dtype)


def manifests_of(
    digests: tuple[UnitDigest, ...], units: tuple[Unit, ...], context: int
) -> Manifests:
    """A chain without attachments as the door takes it."""
    return Manifests(list(zip(digests, units, strict=True)), [None] * len(units), context)


def read_subject(root: Path, name: str) -> Subject:
    """The variant of that name; raises UnknownVariant, and UnsupportedFamily for an adapter."""
    with contextlib.closing(Catalog(root)) as catalog:
        variant = catalog.variant(name)
        chain = catalog.chain(variant.chain)
        if any(chain.attachments):
            raise UnsupportedFamily(
                f"{name!r} is {variant.base!r} with attachments, which cannot be taken apart: "
                f"give {variant.base!r}, or merge the adapter first and add the result"
            )
        units = tuple(catalog.unit(unit) for unit in chain.units)
    return Subject(Store(root), variant, units, chain.units)


def check_free(root: Path, name: str, chain: ChainDigest | None = None) -> None:
    """Refuse a name that is taken by anything but the chain `chain`."""
    with contextlib.closing(Catalog(root)) as catalog:
        try:
            known = catalog.variant(name)
        except UnknownVariant:
            return
    if known.chain != chain:
        raise name_taken(name)


def fast_dtype() -> torch.dtype:
    """What frozen networks compute in: bfloat16 where the machine multiplies it in hardware."""
    return torch.bfloat16 if is_bfloat16_fast() else torch.float32
