"""A shipment: one variant on its way between zoos, with all that has to arrive for it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from zoo.catalog import Publication
from zoo.manifest import ChainDigest, ObjectDigest
from zoo.store import ObjectInfo


class Shipment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A publication, and which of its objects travel as a difference to which other object."""

    publication: Publication
    parents: dict[ObjectDigest, ObjectDigest] = {}

    def cargo(self) -> Iterator["Parcel"]:
        """Every object that is needed, parents before what is a difference to them."""
        objects = self.publication.objects
        whole = {digest: info for digest, info in objects.items() if digest not in self.parents}
        for digest, parent in self.parents.items():
            # A parent has the data type and the shape of its difference.
            whole.setdefault(parent, objects[digest])
        for digest, info in whole.items():
            yield Parcel(digest, info)
        for digest, parent in self.parents.items():
            yield Parcel(digest, objects[digest], parent)


class Parcel(msgspec.Struct, frozen=True):
    """One object: what it is said to be, and whose difference it travels as, if it does."""

    digest: ObjectDigest
    info: ObjectInfo
    parent: ObjectDigest | None = None

    @property
    def place(self) -> str:
        """Its file's path within the folder of a zoo or a depot."""
        suffix = ".blob" if self.info.dtype == "BLOB" else ".safetensors"
        suffix = ".difference" if self.parent else suffix
        return f"objects/{self.digest[:2]}/{self.digest[2:4]}/{self.digest}{suffix}"


class Sender(Protocol):
    """Where shipments come from; nothing it says is believed."""

    def names(self) -> list[str]:
        """The variants that it has."""
        ...

    def shipment(self, name: str) -> Shipment:
        """One variant; raises a ZooError."""
        ...

    def file(self, parcel: Parcel) -> AbstractContextManager[Path]:
        """A parcel's file, for as long as it is looked at; raises a ZooError."""
        ...


class Receiver(Protocol):
    """Where shipments go."""

    def chain(self, name: str) -> ChainDigest | None:
        """What a name means there, if anything."""
        ...

    def missing(self, parcels: list[Parcel]) -> list[Parcel]:
        """Those that it does not have."""
        ...

    def take(self, parcel: Parcel, file: Path) -> None:
        """Keep a parcel; raises a ZooError."""
        ...

    def publish(self, shipment: Shipment, *, replace: bool) -> None:
        """Make the variant known, once all its parcels are there."""
        ...
