"""The object store: one read-only file per distinct tensor or blob, named by its digest.

Objects are only ever added whole (temporary file in the target folder, fsync, rename) and removed
by the sweep, so any number of processes may read without a lock. A tensor may lie there as its
difference to another one, its parent, which is always whole itself (`zoo.difference`); its digest
is that of the tensor all the same. `zoo.catalog` says what the objects mean.
"""

import contextlib
import errno
import hashlib
import mmap
import re
from collections.abc import Container, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from zoo.errors import (
    BadName,
    BadTensorFile,
    DamagedObject,
    DiskFull,
    MissingObject,
    StoreFailure,
)
from zoo.manifest import ObjectDigest
from zoo.sources.mapping import map_file
from zoo.sources.tensorfile import TensorFile, header_bytes, tensor_bytes
from zoo.wholefile import LEFTOVERS, holds, sync_folder, write_whole

if TYPE_CHECKING:
    # Brings numpy, which listings do without: imported by what meets a difference.
    from zoo.difference import Head

_DIGEST = re.compile(r"[0-9a-f]{64}")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TENSOR, _DIFFERENCE, _BLOB = ".safetensors", ".difference", ".blob"
_SUFFIXES = (_TENSOR, _DIFFERENCE, _BLOB)
# A tensor becomes a difference if it is large enough for a file's blocks to count and if at most
# this share of its bytes is left.
_SMALLEST_BYTES = 16 << 10
_WORTH = 0.9


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What an object holds; a blob has the dtype "BLOB" and its length as its shape."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor: `data` is 64-byte aligned, little endian, C order. It is the object's mapped file
    and read-only, or, of an object that is kept as a difference, memory of its own and writable."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def tensor_digest(dtype: str, shape: tuple[int, ...], data: memoryview | bytes) -> ObjectDigest:
    """SHA-256 over the canonical form: kind, dtype and shape in one line, then the bytes."""
    head = b"tensor " + msgspec.json.encode({"dtype": dtype, "shape": shape}) + b"\n"
    sha = hashlib.sha256(head)
    sha.update(data)
    return ObjectDigest(sha.hexdigest())


def blob_digest(data: bytes) -> ObjectDigest:
    """SHA-256 of a blob; its own prefix keeps it apart from tensors."""
    return ObjectDigest(hashlib.sha256(b"blob\n" + data).hexdigest())


def checked_digest(digest: str) -> ObjectDigest:
    """`digest` if it has the form of one; names of files never come from anything else."""
    if not _DIGEST.fullmatch(digest):
        raise BadName(f"{digest!r} is not a digest: 64 hexadecimal digits are needed")
    return ObjectDigest(digest)


class Store:
    """Objects under `root`/objects; the folder is made when the first object is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "objects"
        self._written: list[Path] = []
        self._unsettled: set[Path] = set()

    def put_tensor(
        self,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview | bytes,
        parent: ObjectDigest | None = None,
    ) -> ObjectDigest:
        """Keep a tensor; the name says how to find it again. Raises DiskFull or StoreFailure.

        Where that saves enough, it is kept as its difference to the object `parent`. An object that
        is there already is compared byte for byte and healed if it is damaged.
        """
        view = memoryview(data).cast("B")
        if len(view) != tensor_bytes(dtype, shape):
            raise BadTensorFile(f"{len(view)} bytes do not make a {dtype} tensor of {list(shape)}")
        digest = tensor_digest(dtype, shape, view)
        if self._is_kept_as_difference(digest, view):
            return digest
        if parent is not None and not self._place(digest, _TENSOR).is_file():
            from zoo.difference import Head

            head = Head(self.parent(parent) or parent, dtype, shape)
            if self._keep_difference(digest, head, view):
                return digest
        self._keep(self._place(digest, _TENSOR), header_bytes("tensor", dtype, shape), view)
        self._place(digest, _DIFFERENCE).unlink(missing_ok=True)
        return digest

    def put_blob(self, data: bytes) -> ObjectDigest:
        """Keep a small file as it is."""
        digest = blob_digest(data)
        self._keep(self._place(digest, _BLOB), b"", memoryview(data))
        return digest

    def tensor(self, digest: ObjectDigest) -> StoredTensor:
        """Map a tensor, or make it of its difference. What says where its bytes lie is checked;
        they themselves are trusted (see `verify`)."""
        if self.path(digest).suffix == _DIFFERENCE:
            return self._restored(digest)
        file = self._open(digest)
        entry = file.entries["tensor"]
        return StoredTensor(entry.dtype, entry.shape, file.data("tensor"))

    def parent(self, digest: ObjectDigest) -> ObjectDigest | None:
        """The object without which this one cannot be read, if there is one."""
        if not self._is_difference(digest):
            return None
        return self._head(digest)[0].parent

    def blob(self, digest: ObjectDigest) -> bytes:
        """Read a blob and check it against its digest."""
        try:
            data = self._place(digest, _BLOB).read_bytes()
        except FileNotFoundError:
            raise _missing(digest) from None
        if blob_digest(data) != digest:
            raise _damaged(digest)
        return data

    def info(self, digest: ObjectDigest) -> ObjectInfo:
        """Dtype, shape and size of an object, without touching its data."""
        path = self.path(digest)
        if path.suffix == _BLOB:
            size = path.stat().st_size
            return ObjectInfo("BLOB", (size,), size)
        if path.suffix == _DIFFERENCE:
            head, _ = self._head(digest)
            return ObjectInfo(head.dtype, head.shape, head.nbytes)
        entry = self._open(digest).entries["tensor"]
        return ObjectInfo(entry.dtype, entry.shape, entry.nbytes)

    def verify(self, digest: ObjectDigest) -> None:
        """Hash an object again; raises MissingObject or DamagedObject."""
        path = self.path(digest)
        if path.suffix == _BLOB:
            self.blob(digest)
            return
        if path.suffix == _DIFFERENCE:
            from zoo.difference import is_intact

            if not is_intact(map_file(path)):
                raise _damaged(digest)
        stored = self.tensor(digest)
        if tensor_digest(stored.dtype, stored.shape, stored.data) != digest:
            raise _damaged(digest)

    def path(self, digest: ObjectDigest) -> Path:
        """The object's file; raises MissingObject."""
        for suffix in _SUFFIXES:
            path = self._place(digest, suffix)
            if path.is_file():
                return path
        raise _missing(digest)

    def has(self, digest: ObjectDigest) -> bool:
        """Whether the object is there."""
        return any(self._place(digest, suffix).is_file() for suffix in _SUFFIXES)

    def digests(self) -> Iterator[ObjectDigest]:
        """Every object on disk; files that are named otherwise are passed over."""
        for path in self.folder.glob("??/??/*"):
            if path.suffix in _SUFFIXES and _DIGEST.fullmatch(path.stem):
                if path.suffix == _DIFFERENCE and path.with_suffix(_TENSOR).is_file():
                    continue
                yield ObjectDigest(path.stem)

    def disk_bytes(self) -> int:
        """Bytes of all objects' files, headers included."""
        return sum(path.stat().st_size for path in self.folder.glob("??/??/*") if path.is_file())

    def leftovers(self) -> list[Path]:
        """Temporary files of writers that were killed; only the holder of the lock may remove
        them."""
        return sorted(self.folder.glob(f"??/??/{LEFTOVERS}"))

    def delete(self, digest: ObjectDigest) -> int:
        """Remove an object and return the bytes freed; readers that mapped it keep their bytes."""
        size = 0
        while self.has(digest):
            path = self.path(digest)
            size += path.stat().st_size
            path.unlink()
        return size

    def settle(self) -> None:
        """Make the names of everything written survive a power loss; call it before publishing."""
        for folder in sorted(self._unsettled, reverse=True):
            with self._failures(folder):
                sync_folder(folder)
        self._unsettled.clear()

    def take_back(self, keep: Container[ObjectDigest] = ()) -> None:
        """Remove what this Store wrote, but for `keep`: for a writer that fails before it
        publishes, or that needed objects only on the way. It must hold the zoo's lock, so that
        nobody else has come to rely on them."""
        kept = [path for path in self._written if ObjectDigest(path.stem) in keep]
        for path in self._written:
            if path not in kept:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        self._written = kept

    def _place(self, digest: ObjectDigest, suffix: str) -> Path:
        name = checked_digest(digest)
        return self.folder / f"{name[:2]}/{name[2:4]}/{name}{suffix}"

    def _open(self, digest: ObjectDigest) -> TensorFile:
        path = self._place(digest, _TENSOR)
        try:
            file = TensorFile(path)
        except BadTensorFile as error:
            raise _damaged(digest) if path.is_file() else _missing(digest) from error
        if list(file.entries) != ["tensor"]:
            raise _damaged(digest)
        return file

    @contextlib.contextmanager
    def _failures(self, path: Path) -> Generator[None]:
        """Say in our words why the file system refused."""
        try:
            yield
        except OSError as error:
            if error.errno in NO_ROOM:
                raise DiskFull(
                    f"there is no room left for {self.root}: free some space and try again"
                ) from error
            raise StoreFailure(f"{path} cannot be written: {error.strerror}") from error

    def _keep(self, path: Path, head: bytes, data: memoryview) -> None:
        if holds(path, head, data):
            return
        with self._failures(path):
            write_whole(path, (head, data))
        self._note(path)
        if not holds(path, head, data):
            raise _unreadable(path)

    def _note(self, path: Path) -> None:
        """Remember what was written."""
        self._unsettled.update(list(path.parents)[:4])
        self._written.append(path)

    # ---- tensors that are kept as differences ---------------------------------------------------

    def _is_difference(self, digest: ObjectDigest) -> bool:
        whole = self._place(digest, _TENSOR)
        return not whole.is_file() and whole.with_suffix(_DIFFERENCE).is_file()

    def _is_kept_as_difference(self, digest: ObjectDigest, data: memoryview) -> bool:
        """Whether the tensor is there as a difference that lost no bit, and reads back as these
        bytes."""
        if not self._is_difference(digest):
            return False
        from zoo.difference import is_intact

        try:
            return is_intact(map_file(self.path(digest))) and self._reads_back(digest, data)
        except (DamagedObject, MissingObject):
            return False

    def _keep_difference(self, digest: ObjectDigest, head: "Head", data: memoryview) -> bool:
        """Keep a tensor as a difference, unless that is impossible or saves too little."""
        from zoo.difference import DTYPES, encode

        if head.dtype not in DTYPES or len(data) < _SMALLEST_BYTES or head.parent == digest:
            return False
        parent = self.tensor(head.parent)
        if (parent.dtype, parent.shape) != (head.dtype, head.shape):
            return False
        path = self._place(digest, _DIFFERENCE)
        try:
            with self._failures(path):
                write_whole(
                    path, _at_most(int(_WORTH * len(data)), encode(head, parent.data, data))
                )
        except _NotWorthIt:
            return False
        self._note(path)
        if not self._reads_back(digest, data):
            raise _unreadable(path)
        return True

    def _reads_back(self, digest: ObjectDigest, data: memoryview) -> bool:
        position = 0
        for chunk in self._chunks(digest):
            if data[position : position + len(chunk)] != chunk:
                return False
            position += len(chunk)
        return position == len(data)

    def _restored(self, digest: ObjectDigest) -> StoredTensor:
        head, _ = self._head(digest)
        # Whole pages, so aligned; and nothing is written to where a difference is too short.
        data = memoryview(mmap.mmap(-1, max(head.nbytes, 1)))[: head.nbytes]
        position = 0
        for chunk in self._chunks(digest):
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return StoredTensor(head.dtype, head.shape, data)

    def _chunks(self, digest: ObjectDigest) -> Iterator[memoryview]:
        """The bytes of a tensor that is kept as a difference."""
        from zoo.difference import decode

        head, frames = self._head(digest)
        file = self._open(head.parent)
        entry = file.entries["tensor"]
        if (entry.dtype, entry.shape) != (head.dtype, head.shape):
            raise _damaged(digest)
        try:
            yield from decode(head, frames, file.data("tensor"))
        except BadTensorFile as error:
            raise _damaged(digest) from error

    def _head(self, digest: ObjectDigest) -> "tuple[Head, memoryview]":
        from zoo.difference import read_head

        try:
            head, frames = read_head(map_file(self._place(digest, _DIFFERENCE)))
            checked_digest(head.parent)
        except FileNotFoundError:
            raise _missing(digest) from None
        except (BadTensorFile, BadName, OSError) as error:
            raise _damaged(digest) from error
        return head, frames


class _NotWorthIt(Exception):
    """A difference is not so much smaller that it should be kept."""


def _at_most(limit: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces, as long as they do not exceed `limit` bytes together."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise _NotWorthIt
        yield piece


def _unreadable(path: Path) -> StoreFailure:
    return StoreFailure(f"{path} does not read back as it was written: check the disk")


def _missing(digest: str) -> MissingObject:
    return MissingObject(f"object {digest} is missing: add the variants that use it again")


def _damaged(digest: str) -> DamagedObject:
    return DamagedObject(f"object {digest} is damaged: add the variants that use it again")
