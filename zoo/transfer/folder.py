"""A zoo in a folder, as an end of a transfer: this machine's own, or another one's that can be
reached as a path."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from msgspec.structs import replace

from zoo.catalog import Catalog, Publication
from zoo.dummy.refusal import check_weights
from zoo.errors import DiskFull, MissingObject, UnknownVariant
from zoo.keeping.reach import Reach
from zoo.manifest import ChainDigest
from zoo.store import Store
from zoo.transfer.arrival import keep
from zoo.transfer.shipment import Parcel, Shipment


class Folder:
    """Both ends. Who receives holds the zoo's lock and gives a writable catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = Store(catalog.root)

    # ---- sending --------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The variants, without aliases, which are each zoo's own, and without private ones, which
        travel only when they are named."""
        self._catalog.database.check_plain()
        return [variant.name for variant in self._catalog.variants() if not variant.private]

    def shipment(self, name: str) -> Shipment:
        """A variant; NAME@N travels as NAME."""
        with self._catalog.database.snapshot():
            return self._shipment(name)

    def _shipment(self, name: str) -> Shipment:
        self._catalog.database.check_plain()
        variant = self._catalog.variant(name)
        check_weights([variant], "sent to another zoo")
        reach, infos = Reach(self._catalog), self._catalog.objects()
        footprint = reach.footprint(variant)
        objects = {d: infos.get(d) or self._store.info(d) for d in sorted(footprint.objects)}
        chain = footprint.chain
        return Shipment(
            publication=Publication(
                variant=replace(variant, name=variant.name.partition("@")[0]),
                chain=chain,
                units={unit: reach.unit(unit) for unit in chain.units},
                attachments={d: reach.attachment(d) for d in chain.attachments if d},
                objects=objects,
            ),
            parents={d: parent for d in objects if (parent := self._store.parent(d))},
        )

    @contextlib.contextmanager
    def file(self, parcel: Parcel) -> Generator[Path]:
        """The object's own file."""
        path = self._catalog.root / parcel.place
        if not path.is_file():
            raise MissingObject(f"object {parcel.digest} is missing in {self._catalog.root}")
        yield path

    # ---- receiving ------------------------------------------------------------------------------

    def chain(self, name: str) -> ChainDigest | None:
        """What the name means."""
        try:
            return self._catalog.variant(name).chain
        except UnknownVariant:
            return None

    def missing(self, parcels: list[Parcel]) -> list[Parcel]:
        """Those not in the store; raises DiskFull if they cannot fit."""
        found = [parcel for parcel in parcels if not self._store.has(parcel.digest)]
        self._catalog.root.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(self._catalog.root)
        wanted, free = sum(p.info.nbytes for p in found), disk.f_bavail * disk.f_frsize
        if wanted > free:
            raise DiskFull(
                f"{wanted} bytes are to come and {self._catalog.root} has {free}: free some space"
            )
        return found

    def take(self, parcel: Parcel, file: Path) -> None:
        """Check the object against its digest and keep it."""
        keep(self._store, parcel, file)

    def publish(self, shipment: Shipment, *, replace: bool) -> None:
        """Objects are settled first, the catalog comes last."""
        self._store.settle()
        self._catalog.publish(shipment.publication, replace=replace)
