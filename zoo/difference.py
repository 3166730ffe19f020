"""A tensor as a lossless, compressed difference to another one of the same data type and shape.

A fine-tune moves nearly every weight by a few units in the last place. Floats are mapped to
integers in the same order, so that such a step is a small number; elements are grouped by the
parent's exponent, which says how large the number tends to be; each byte of it is compressed on its
own. Works in chunks of bounded memory. `zoo.store` owns the files.

A file is: length of the head (7 bytes, little endian), format (1 byte), head (JSON), then per chunk
and byte plane, lowest byte first, a length (4 bytes) and a zstd frame; last the SHA-256 of it all,
because a frame may lose a bit that its content does not depend on (files of format 0 have none).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import zstandard

from zoo.errors import BadTensorFile
from zoo.manifest import ObjectDigest
from zoo.sources.tensorfile import tensor_bytes

CHUNK_ITEMS = 1 << 20
MAX_HEAD_BYTES = 1 << 16
_FORMAT = 1
_SEAL_BYTES = 32
# Higher levels search for repetitions, of which there are none: slower and no smaller.
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a float lies in an unsigned integer: its type, and where the exponent begins."""

    unsigned: np.dtype
    exponent: int

    @property
    def width(self) -> int:
        return self.unsigned.itemsize

    @property
    def signed(self) -> str:
        return f"<i{self.width}"

    @property
    def sign(self) -> np.generic:
        return self.unsigned.type(1 << (8 * self.width - 1))


_LAYOUTS = {
    "BF16": _Layout(np.dtype("<u2"), 7),
    "F16": _Layout(np.dtype("<u2"), 10),
    "F32": _Layout(np.dtype("<u4"), 23),
}
DTYPES = frozenset(_LAYOUTS)


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose difference it is: the parent is an object of the same dtype and shape."""

    parent: ObjectDigest
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.dtype, self.shape)


def encode(head: Head, parent: memoryview, data: memoryview) -> Iterator[bytes]:
    """The file, piece by piece; `parent` and `data` are the bytes of both tensors."""
    seal = hashlib.sha256()
    for piece in _pieces(head, parent, data):
        seal.update(piece)
        yield piece
    yield seal.digest()


def is_intact(content: memoryview) -> bool:
    """Whether a file has lost no bit."""
    if len(content) < 8 or content[7] != _FORMAT:
        return len(content) >= 8 and content[7] == 0
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == bytes(content[-_SEAL_BYTES:])


def _pieces(head: Head, parent: memoryview, data: memoryview) -> Iterator[bytes]:
    text = msgspec.json.encode(head)
    yield len(text).to_bytes(7, "little") + bytes([_FORMAT]) + text
    layout = _LAYOUTS[head.dtype]
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    theirs, ours = np.frombuffer(parent, layout.unsigned), np.frombuffer(data, layout.unsigned)
    for start in range(0, len(ours), CHUNK_ITEMS):
        there, here = theirs[start : start + CHUNK_ITEMS], ours[start : start + CHUNK_ITEMS]
        steps = _folded(_ordered(here, layout) - _ordered(there, layout), layout)
        planes = steps[_groups(there, layout)].view(np.uint8).reshape(-1, layout.width)
        for plane in range(layout.width):
            frame = compressor.compress(planes[:, plane].tobytes())
            yield len(frame).to_bytes(4, "little") + frame


def read_head(content: memoryview) -> tuple[Head, memoryview]:
    """The head of a file and the rest of it. Raises BadTensorFile."""
    if len(content) < 8 or content[7] > _FORMAT:
        raise BadTensorFile("it is of no known format")
    rest = content[8 : len(content) - content[7] * _SEAL_BYTES]
    length = int.from_bytes(content[:7], "little")
    if length > min(MAX_HEAD_BYTES, len(rest)):
        raise BadTensorFile("its head is longer than the file")
    try:
        head = msgspec.json.decode(rest[:length], type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadTensorFile(f"its head is not valid: {error}") from error
    if head.dtype not in DTYPES:
        raise BadTensorFile(f"differences of {head.dtype} do not exist")
    tensor_bytes(head.dtype, head.shape)
    return head, rest[length:]


def decode(head: Head, frames: memoryview, parent: memoryview) -> Iterator[memoryview]:
    """The tensor's bytes, chunk by chunk. Raises BadTensorFile."""
    layout = _LAYOUTS[head.dtype]
    theirs = np.frombuffer(parent, layout.unsigned)
    decompressor = zstandard.ZstdDecompressor()
    for start in range(0, len(theirs), CHUNK_ITEMS):
        there = theirs[start : start + CHUNK_ITEMS]
        planes = np.empty((len(there), layout.width), np.uint8)
        for plane in range(layout.width):
            frame, frames = _next_frame(frames)
            planes[:, plane] = _bytes(decompressor, frame, len(there))
        steps = np.empty_like(there)
        steps[_groups(there, layout)] = planes.view(layout.unsigned)[:, 0]
        whole = _ordered(there, layout) + _unfolded(steps, layout)
        yield _unordered(whole, layout).view(np.uint8).data
    if len(frames):
        raise BadTensorFile(f"{len(frames)} bytes follow its last chunk")


def _next_frame(frames: memoryview) -> tuple[memoryview, memoryview]:
    length = int.from_bytes(frames[:4], "little")
    if len(frames) < 4 or length > len(frames) - 4:
        raise BadTensorFile("it ends within a chunk")
    return frames[4 : 4 + length], frames[4 + length :]


def _bytes(
    decompressor: zstandard.ZstdDecompressor, frame: memoryview, expected: int
) -> np.ndarray:
    """A frame's content, whose size is checked before memory is taken for it."""
    try:
        if zstandard.frame_content_size(frame) != expected:
            raise BadTensorFile("a chunk of it is not of the size of its parent's")
        return np.frombuffer(decompressor.decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise BadTensorFile(f"a chunk of it cannot be decompressed: {error}") from error


def _ordered(bits: np.ndarray, layout: _Layout) -> np.ndarray:
    """Integers in the order of the floats: negative ones are flipped, positive ones lie above."""
    return bits ^ (_signs(bits, layout) | layout.sign)


def _unordered(integers: np.ndarray, layout: _Layout) -> np.ndarray:
    """The inverse of `_ordered`."""
    return integers ^ (~_signs(integers, layout) | layout.sign)


def _signs(bits: np.ndarray, layout: _Layout) -> np.ndarray:
    """All bits set where the highest one is, none elsewhere."""
    return (bits.view(layout.signed) >> (8 * layout.width - 1)).view(layout.unsigned)


def _folded(steps: np.ndarray, layout: _Layout) -> np.ndarray:
    """Steps of either sign as small integers: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    return (steps << layout.unsigned.type(1)) ^ _signs(steps, layout)


def _unfolded(folded: np.ndarray, layout: _Layout) -> np.ndarray:
    """The inverse of `_folded`."""
    one = layout.unsigned.type(1)
    return (folded >> one) ^ (~(folded & one) + one)


def _groups(parent: np.ndarray, layout: _Layout) -> np.ndarray:
    """Places in the order of the parent's exponents: what both sides know beforehand."""
    exponents = (parent >> layout.unsigned.type(layout.exponent)).astype(np.uint8)
    return np.argsort(exponents, kind="stable")
