"""A depot, as an end of a transfer: a place that fsspec reaches by its URL, such as a bucket.

It has the objects in the same folders as a zoo and, instead of a catalog, one JSON file per variant
that is written last, so that two who push at once never undo each other.
"""

import contextlib
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import msgspec

from zoo.errors import BadDelivery, BadSource, StoreFailure, UnknownVariant, ZooError
from zoo.manifest import ChainDigest, canonical
from zoo.transfer.arrival import largest_file
from zoo.transfer.shipment import Parcel, Shipment

MAX_RECORD_BYTES = 64 << 20
_SUFFIX = ".json"
_CHUNK_BYTES = 1 << 20


class Depot:
    """Both ends. `scratch` is a folder for what has come and is not checked yet."""

    def __init__(self, url: str, scratch: Path) -> None:
        self._url = url
        self._scratch = scratch
        with self._failures("cannot be reached"):
            self._system, self._root = _open(url)
        self._present: set[str] | None = None

    # ---- sending --------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The variants that were pushed there."""
        with self._failures("cannot be read"):
            files: list[str] = self._system.find(f"{self._root}/variants")
        names = (file.rpartition("/")[2] for file in files if file.endswith(_SUFFIX))
        return sorted(unquote(name.removesuffix(_SUFFIX)) for name in names)

    def shipment(self, name: str) -> Shipment:
        """A variant's record."""
        place = self._record(name)
        with self._failures("cannot be read"):
            if not self._system.exists(place):
                known = ", ".join(self.names()[:8]) or "nothing"
                raise UnknownVariant(f"{self._url} has no variant {name!r}: there is {known}")
            data = self._system.cat_file(place, end=MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            raise BadDelivery(f"the record of {name!r} has more than {MAX_RECORD_BYTES} bytes")
        try:
            return msgspec.json.decode(data, type=Shipment)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadDelivery(
                f"the record of {name!r} in {self._url} is broken: {error}"
            ) from error

    @contextlib.contextmanager
    def file(self, parcel: Parcel) -> Generator[Path]:
        """A copy of the object's file, no larger than it can rightly be."""
        copy = self._scratch / f".tmp-{secrets.token_hex(8)}"
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            with self._failures("cannot be read"):
                self._fetch(parcel, copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _fetch(self, parcel: Parcel, copy: Path) -> None:
        left = largest_file(parcel)
        with (
            self._system.open(f"{self._root}/{parcel.place}", "rb") as there,
            copy.open("xb") as here,
        ):
            while chunk := there.read(_CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise BadDelivery(f"the file of object {parcel.digest} is too large for it")
                here.write(chunk)

    # ---- receiving ------------------------------------------------------------------------------

    def chain(self, name: str) -> ChainDigest | None:
        """What was pushed under the name before."""
        try:
            return self.shipment(name).publication.variant.chain
        except (UnknownVariant, BadDelivery):
            return None

    def missing(self, parcels: list[Parcel]) -> list[Parcel]:
        """Those that are not there; what is there is whole, see `take`."""
        if self._present is None:
            with self._failures("cannot be read"):
                self._present = set(self._system.find(f"{self._root}/objects"))
        return [p for p in parcels if f"{self._root}/{p.place}" not in self._present]

    def take(self, parcel: Parcel, file: Path) -> None:
        """Upload a file under a name of its own, then give it its own."""
        place = f"{self._root}/{parcel.place}"
        draft = f"{self._root}/drafts/{secrets.token_hex(8)}"
        with self._failures("cannot be written"):
            self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._system.makedirs(f"{self._root}/drafts", exist_ok=True)
            self._system.put_file(str(file), draft)
            self._system.mv(draft, place)
        if self._present is not None:
            self._present.add(place)

    def publish(self, shipment: Shipment, *, replace: bool) -> None:
        """Write the variant's record."""
        del replace
        place = self._record(shipment.publication.variant.name)
        with self._failures("cannot be written"):
            self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(place, canonical(shipment))

    def _record(self, name: str) -> str:
        return f"{self._root}/variants/{quote(name, safe='')}{_SUFFIX}"

    @contextlib.contextmanager
    def _failures(self, what: str) -> Generator[None]:
        """Say in our words what a file system of any kind complains of."""
        try:
            yield
        except ZooError:
            raise
        except FileNotFoundError as error:
            raise BadDelivery(f"{self._url} lacks {error}: push its variants again") from error
        except Exception as error:
            # each of fsspec's file systems has errors of its own
            reason = " ".join(str(error).split())
            kind = BadSource if what == "cannot be reached" else StoreFailure
            raise kind(f"{self._url} {what}: {reason}") from error


def _open(url: str) -> tuple[Any, str]:
    system, root = fsspec.core.url_to_fs(url)
    return system, root.rstrip("/")
