"""Files that are there whole or not at all: written beside their place, synced, then renamed.

Used by `zoo.store` and `zoo.packed`; the sweep removes what a killed writer left (`LEFTOVERS`).
"""

import contextlib
import os
import secrets
from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path

LEFTOVERS = ".tmp-*"
_CHUNK_BYTES = 1 << 20


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], *, lasting: bool = True) -> None:
    """Make `path` a read-only file of these pieces; whatever fails, it is as it was. Its content
    survives a power loss if it is to be `lasting`, and so does its name once its folder is
    synced."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(6)}")
    try:
        with _create(temporary) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fchmod(file.fileno(), 0o444)
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def holds(path: Path, head: bytes, data: memoryview) -> bool:
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


def _create(path: Path) -> BufferedWriter:
    try:
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
