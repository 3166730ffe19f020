"""Pushing to and pulling from another zoo: what is there already stays where it is, and a transfer
that was broken off goes on where it stopped."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import msgspec

from zoo.catalog import FILE_NAME, Catalog, name_taken
from zoo.errors import BadSource
from zoo.lock import writing
from zoo.progress import Progress
from zoo.store import Store
from zoo.transfer.depot import Depot
from zoo.transfer.folder import Folder
from zoo.transfer.inspection import inspect
from zoo.transfer.shipment import Receiver, Sender, Shipment


class Moved(msgspec.Struct, frozen=True):
    """What a transfer did: `names` arrived, `known` were there before; objects and bytes of tensors
    and files that travelled, and of all that the named variants need."""

    names: list[str]
    known: list[str]
    objects: int
    bytes: int
    needed_bytes: int


class Move(msgspec.Struct, frozen=True):
    """Which variants to move (none: all), and how: see `zoo.adding.options.AddOptions`."""

    names: tuple[str, ...] = ()
    replace: bool = False
    wait_s: float = 600.0


def push(root: Path, place: str, wanted: Move, progress: Progress) -> Moved:
    """Send variants of the zoo at `root` to a zoo's folder or to a depot's URL. Raises a
    ZooError."""
    with contextlib.closing(Catalog(root)) as mine:
        sender = Folder(mine)
        # Before a zoo is made where there is none.
        _shipments(sender, wanted)
        if _is_url(place):
            return _move(sender, Depot(place, _scratch(root)), wanted, progress)
        with _receiving(Path(place).expanduser(), wanted, progress) as receiver:
            return _move(sender, receiver, wanted, progress)


def pull(root: Path, place: str, wanted: Move, progress: Progress) -> Moved:
    """Fetch variants from a zoo's folder or a depot's URL into the zoo at `root`. Raises a
    ZooError; what has come and is sound stays, so that the next pull need not fetch it again."""
    with contextlib.ExitStack() as stack:
        if _is_url(place):
            sender: Sender = Depot(place, _scratch(root))
        else:
            theirs = Catalog(_folder(place))
            stack.callback(theirs.close)
            sender = Folder(theirs)
        # Before the lock is taken, and before a zoo is made where there is none.
        _shipments(sender, wanted)
        receiver = stack.enter_context(_receiving(root, wanted, progress))
        return _move(sender, receiver, wanted, progress)


def _move(sender: Sender, receiver: Receiver, wanted: Move, progress: Progress) -> Moved:
    shipments = _shipments(sender, wanted)
    fresh: list[Shipment] = []
    for shipment in shipments:
        variant = shipment.publication.variant
        there = receiver.chain(variant.name)
        if there is not None and there != variant.chain and not wanted.replace:
            raise name_taken(variant.name)
        if there != variant.chain:
            fresh.append(shipment)
    objects = bytes_moved = 0
    for shipment in fresh:
        name = shipment.publication.variant.name
        missing = receiver.missing(list(shipment.cargo()))
        for parcel in progress.track(missing, f"moving {name}"):
            with sender.file(parcel) as file:
                receiver.take(parcel, file)
        objects += len(missing)
        bytes_moved += sum(parcel.info.nbytes for parcel in missing)
        receiver.publish(shipment, replace=wanted.replace)
    moved = [shipment.publication.variant.name for shipment in fresh]
    needed = {p.digest: p.info.nbytes for shipment in shipments for p in shipment.cargo()}
    return Moved(
        names=moved,
        known=[s.publication.variant.name for s in shipments if s not in fresh],
        objects=objects,
        bytes=bytes_moved,
        needed_bytes=sum(needed.values()),
    )


def _shipments(sender: Sender, wanted: Move) -> list[Shipment]:
    shipments: list[Shipment] = []
    for name in wanted.names or sender.names():
        shipments.append(sender.shipment(name))
        inspect(shipments[-1], name)
    return shipments


@contextlib.contextmanager
def _receiving(root: Path, wanted: Move, progress: Progress) -> Generator[Folder]:
    with (
        writing(root, wanted.wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        yield Folder(catalog)


def _is_url(place: str) -> bool:
    return "://" in place


def _folder(place: str) -> Path:
    folder = Path(place).expanduser()
    if not (folder / FILE_NAME).is_file():
        raise BadSource(f"{place} is no zoo's folder: give one, or the URL of a depot")
    return folder


def _scratch(root: Path) -> Path:
    """Among the objects, where the sweep looks for what a killed writer left."""
    return Store(root).folder / "00" / "00"
