"""Reading and heading safetensors files, with every byte of the header checked before it is
believed.

Owns the file format alone; `zoo.store` keeps one tensor per file, `zoo.sources.checkpoint` and
`zoo.adapters` read files of others.
"""

import math
from pathlib import Path

import msgspec

from zoo.errors import BadTensorFile
from zoo.sources.mapping import map_file

MAX_HEADER_BYTES = 100_000_000
# Colons of a header: a tensor has four. The largest models have some fifty thousand tensors.
MAX_HEADER_COLONS = 1 << 20
MAX_NAME = 500
MAX_EXTENTS = 8
ALIGNMENT = 64

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor's place in a file; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.data_offsets[1] - self.data_offsets[0]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises BadTensorFile for an unknown dtype or a negative extent."""
    if dtype not in ITEM_BYTES:
        raise BadTensorFile(f"the data type {dtype[:50]!r} is unknown")
    if len(shape) > MAX_EXTENTS:
        raise BadTensorFile(f"there are {len(shape)} extents, more than {MAX_EXTENTS}")
    if any(extent < 0 for extent in shape):
        raise BadTensorFile(f"the shape {list(shape)} has a negative extent")
    return ITEM_BYTES[dtype] * math.prod(shape)


def header_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Head of a file that holds one tensor, padded so that the data starts on 64 bytes."""
    entry = Entry(dtype, shape, (0, tensor_bytes(dtype, shape)))
    text = msgspec.json.encode({name: entry})
    padded = text + b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


class TensorFile:
    """A safetensors file mapped into memory: `entries` by name, `data(name)` without copying."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._content = map_file(path)
        except OSError as error:
            raise BadTensorFile(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.entries, self._start = _parse(self._content)
        except BadTensorFile as error:
            raise BadTensorFile(f"{path} is not a sound safetensors file: {error}") from error

    def data(self, name: str) -> memoryview:
        """The bytes of one tensor, read-only."""
        begin, end = self.entries[name].data_offsets
        return self._content[self._start + begin : self._start + end]


def _parse(content: memoryview) -> tuple[dict[str, Entry], int]:
    if len(content) < 8:
        raise BadTensorFile(f"it has {len(content)} bytes, too few for a header")
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadTensorFile(f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
    if 8 + length > len(content):
        raise BadTensorFile(f"its header claims {length} bytes but the file has {len(content)}")
    entries = _entries(bytes(content[8 : 8 + length]))
    _check_places(entries, len(content) - 8 - length)
    return entries, 8 + length


def _entries(header: bytes) -> dict[str, Entry]:
    """The tensors of a header. What takes memory is counted before it is decoded."""
    if header.count(b":") > MAX_HEADER_COLONS:
        raise BadTensorFile("its header has more entries than any model has tensors")
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = bytes(raw.pop("__metadata__", b""))
        entries = {
            name: msgspec.json.decode(value, type=Entry, strict=True) for name, value in raw.items()
        }
    except RecursionError:
        raise BadTensorFile("its header is not valid: it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadTensorFile(f"its header is not valid: {error}") from error
    for key in (b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"'):
        known = bool(metadata) if key == b'"__metadata__"' else len(entries)
        if header.count(key) - metadata.count(key) != known:
            raise BadTensorFile("its header is not valid: it says something twice")
    return entries


def _check_places(entries: dict[str, Entry], room: int) -> None:
    """Tensors must fill the data exactly: no overlap, no hole, no rest."""
    position = 0
    longest = max(entries, key=len, default="")
    if len(longest) > MAX_NAME:
        raise BadTensorFile(f"the name {longest[:50] + '...'!r} has {len(longest)} characters")
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        try:
            expected = tensor_bytes(entry.dtype, entry.shape)
        except BadTensorFile as error:
            raise BadTensorFile(f"in tensor {name!r} {error}") from error
        if begin != position:
            fault = "overlaps another one" if begin < position else "leaves a hole before it"
            raise BadTensorFile(f"tensor {name!r} {fault}")
        if end - begin != expected:
            raise BadTensorFile(f"tensor {name!r} has {end - begin} bytes instead of {expected}")
        if end > room:
            raise BadTensorFile(f"tensor {name!r} ends after the file: it is truncated")
        position = end
    if position != room:
        raise BadTensorFile(f"{room - position} bytes belong to no tensor")
