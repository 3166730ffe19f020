"""An object on arrival: its file is read with distrust, and kept only if it has the digest that was
promised."""

from pathlib import Path

from zoo.difference import decode, is_intact, read_head
from zoo.errors import BadDelivery, BadTensorFile, MissingObject
from zoo.sources.mapping import map_file
from zoo.sources.tensorfile import TensorFile
from zoo.store import Store, blob_digest, tensor_digest
from zoo.transfer.shipment import Parcel

# What a file may have beside its tensor's bytes: a header, the lengths of a difference's chunks.
_HEAD_BYTES = 1 << 16
_FRAMES_SHARE = 64


def largest_file(parcel: Parcel) -> int:
    """Bytes beyond which a parcel's file cannot be what it is said to be."""
    return parcel.info.nbytes + parcel.info.nbytes // _FRAMES_SHARE + _HEAD_BYTES


def keep(store: Store, parcel: Parcel, file: Path) -> None:
    """Put a parcel's object into the store; raises BadDelivery for another one than was promised,
    and then nothing is written."""
    size = file.stat().st_size
    if size > largest_file(parcel):
        raise BadDelivery(f"the file of object {parcel.digest} has {size} bytes: too many for it")
    if parcel.info.dtype == "BLOB":
        data = file.read_bytes()
        if blob_digest(data) != parcel.digest:
            raise _other(parcel)
        store.put_blob(data)
        return
    try:
        data = _whole(parcel, file) if parcel.parent is None else _restored(store, parcel, file)
    except BadTensorFile as error:
        raise BadDelivery(f"the file of object {parcel.digest} is not sound: {error}") from error
    if tensor_digest(parcel.info.dtype, parcel.info.shape, data) != parcel.digest:
        raise _other(parcel)
    store.put_tensor(parcel.info.dtype, parcel.info.shape, data, parent=parcel.parent)


def _whole(parcel: Parcel, file: Path) -> memoryview:
    content = TensorFile(file)
    entry = content.entries.get("tensor")
    if entry is None or (entry.dtype, entry.shape) != (parcel.info.dtype, parcel.info.shape):
        raise _other(parcel)
    return content.data("tensor")


def _restored(store: Store, parcel: Parcel, file: Path) -> memoryview:
    content = map_file(file)
    head, frames = read_head(content)
    if not is_intact(content):
        raise _other(parcel)
    if (head.parent, head.dtype, head.shape) != (
        parcel.parent,
        parcel.info.dtype,
        parcel.info.shape,
    ):
        raise _other(parcel)
    try:
        parent = store.tensor(head.parent)
    except MissingObject:
        raise _other(parcel) from None
    if (parent.dtype, parent.shape) != (head.dtype, head.shape):
        raise _other(parcel)
    return memoryview(b"".join(decode(head, frames, parent.data)))


def _other(parcel: Parcel) -> BadDelivery:
    return BadDelivery(f"object {parcel.digest} is not what was promised: it was not taken")
