"""The object store: one read-only file per distinct tensor or blob, named by its digest.

Objects are only ever added whole (temporary file in the target folder, fsync, rename) and removed
by the sweep, so any number of processes may read without a lock. `zoo.catalog` says what the
objects mean.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

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
from zoo.tensorfile import TensorFile, header_bytes, tensor_bytes

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp-"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK_BYTES = 1 << 20
_TENSOR, _BLOB = ".safetensors", ".blob"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What an object holds; a blob has the dtype "BLOB" and its length as its shape."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a mapped file: `data` is read-only, 64-byte aligned, little endian, C order."""

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
        self, dtype: str, shape: tuple[int, ...], data: memoryview | bytes
    ) -> ObjectDigest:
        """Keep a tensor; the name says how to find it again. Raises DiskFull or StoreFailure.

        An object that is there already is compared byte for byte and healed if it is damaged.
        """
        view = memoryview(data).cast("B")
        if len(view) != tensor_bytes(dtype, shape):
            raise BadTensorFile(f"{len(view)} bytes do not make a {dtype} tensor of {list(shape)}")
        digest = tensor_digest(dtype, shape, view)
        self._keep(self._place(digest, _TENSOR), header_bytes("tensor", dtype, shape), view)
        return digest

    def put_blob(self, data: bytes) -> ObjectDigest:
        """Keep a small file as it is."""
        digest = blob_digest(data)
        self._keep(self._place(digest, _BLOB), b"", memoryview(data))
        return digest

    def tensor(self, digest: ObjectDigest) -> StoredTensor:
        """Map a tensor. Its header is checked; its bytes are trusted (see `verify`)."""
        file = self._open(digest)
        entry = file.entries["tensor"]
        return StoredTensor(entry.dtype, entry.shape, file.data("tensor"))

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
        entry = self._open(digest).entries["tensor"]
        return ObjectInfo(entry.dtype, entry.shape, entry.nbytes)

    def verify(self, digest: ObjectDigest) -> None:
        """Hash an object again; raises MissingObject or DamagedObject."""
        if self.path(digest).suffix == _BLOB:
            self.blob(digest)
            return
        stored = self.tensor(digest)
        if tensor_digest(stored.dtype, stored.shape, stored.data) != digest:
            raise _damaged(digest)

    def path(self, digest: ObjectDigest) -> Path:
        """The object's file; raises MissingObject."""
        for suffix in (_TENSOR, _BLOB):
            path = self._place(digest, suffix)
            if path.is_file():
                return path
        raise _missing(digest)

    def has(self, digest: ObjectDigest) -> bool:
        """Whether the object is there."""
        return any(self._place(digest, suffix).is_file() for suffix in (_TENSOR, _BLOB))

    def digests(self) -> Iterator[ObjectDigest]:
        """Every object on disk; files that are named otherwise are passed over."""
        for path in self.folder.glob("??/??/*"):
            if path.suffix in {_TENSOR, _BLOB} and _DIGEST.fullmatch(path.stem):
                yield ObjectDigest(path.stem)

    def disk_bytes(self) -> int:
        """Bytes of all objects' files, headers included."""
        return sum(path.stat().st_size for path in self.folder.glob("??/??/*") if path.is_file())

    def leftovers(self) -> list[Path]:
        """Temporary files of writers that were killed; only the holder of the lock may remove
        them."""
        return sorted(self.folder.glob(f"??/??/{_TEMPORARY}*"))

    def delete(self, digest: ObjectDigest) -> int:
        """Remove an object and return the bytes freed; readers that mapped it keep their bytes."""
        path = self.path(digest)
        size = path.stat().st_size
        path.unlink()
        return size

    def settle(self) -> None:
        """Make the names of everything written survive a power loss; call it before publishing."""
        for folder in sorted(self._unsettled, reverse=True):
            with self._failures(folder):
                _sync_folder(folder)
        self._unsettled.clear()

    def take_back(self) -> None:
        """Remove what this Store wrote: for a writer that fails before it publishes. It must hold
        the zoo's lock, so that nobody else has come to rely on these objects."""
        while self._written:
            with contextlib.suppress(OSError):
                self._written.pop().unlink(missing_ok=True)

    def _place(self, digest: ObjectDigest, suffix: str) -> Path:
        name = checked_digest(digest)
        return self.folder / name[:2] / name[2:4] / (name + suffix)

    def _open(self, digest: ObjectDigest) -> TensorFile:
        path = self._place(digest, _TENSOR)
        if not path.is_file():
            raise _missing(digest)
        try:
            file = TensorFile(path)
        except BadTensorFile as error:
            raise _damaged(digest) from error
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
        if _holds(path, head, data):
            return
        with self._failures(path):
            _write(path, head, data)
        self._unsettled.update(list(path.parents)[:4])
        self._written.append(path)
        if not _holds(path, head, data):
            raise StoreFailure(f"{path} does not read back as it was written: check the disk")


def _missing(digest: str) -> MissingObject:
    return MissingObject(f"object {digest} is missing: add the variants that use it again")


def _damaged(digest: str) -> DamagedObject:
    return DamagedObject(f"object {digest} is damaged: add the variants that use it again")


def _holds(path: Path, head: bytes, data: memoryview) -> bool:
    """Whether the file is exactly `head` + `data`."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != len(head) + len(data):
                return False
            if file.read(len(head)) != head:
                return False
            return all(
                file.read(_CHUNK_BYTES) == data[start : start + _CHUNK_BYTES].tobytes()
                for start in range(0, len(data), _CHUNK_BYTES)
            )
    except OSError:
        return False


def _write(path: Path, head: bytes, data: memoryview) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        with _create(temporary) as file:
            file.write(head)
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _create(path: Path) -> BufferedWriter:
    try:
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
