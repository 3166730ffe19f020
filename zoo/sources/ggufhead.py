"""The head of a `.gguf` file, walked with every count and place checked before transformers reads
the file, which believes what it says.

Layout: magic, version, number of tensors, number of settings; settings (name, type, value); tensors
(name, extents, type, place); data.
"""

import math
import struct
from pathlib import Path
from typing import Any

from zoo.errors import BadCheckpoint
from zoo.sources.bounds import largest
from zoo.sources.mapping import map_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_TENSORS = 1 << 16
_MAX_SETTINGS = 1 << 14
_MAX_ITEMS = 1 << 23
_MAX_NAME = 1 << 16
_MAX_EXTENTS = 4
_ALIGNMENT = "general.alignment"

_STRING, _ARRAY = 8, 9
# Type -> how struct reads it.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class _Reader:
    """A place in the file that never leaves it."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self.position = 0

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > len(self._content) - self.position:
            raise BadCheckpoint("it ends within its head")
        self.position += count
        return self._content[self.position - count : self.position]

    def number(self, kind: str) -> Any:  # noqa: ANN401 whatever the type says
        """One number of struct's type `kind`."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return value

    def count(self, most: int, what: str) -> int:
        """A number that says how many follow."""
        found = self.number("Q")
        if found > most:
            raise BadCheckpoint(f"it claims {found} {what}, more than {most}")
        return found

    def text(self) -> bytes:
        """A string."""
        return bytes(self.take(self.count(len(self._content), "bytes of a string")))

    def value(self, kind: int) -> int | float | None:
        """A setting's value, if it is a number; others are passed over."""
        if kind == _STRING:
            self.text()
            return None
        if kind == _ARRAY:
            self._array()
            return None
        if kind not in _SCALARS:
            raise BadCheckpoint(f"it has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self) -> None:
        kind, count = self.number("I"), self.count(_MAX_ITEMS, "items of a list")
        if kind == _STRING:
            for _ in range(count):
                self.text()
        elif kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        else:
            raise BadCheckpoint(f"it has a list of the unknown type {kind}")


def check_head(path: Path) -> None:
    """Raises BadCheckpoint for the first thing in a file's head that cannot be."""
    content = map_file(path)
    try:
        _check(_Reader(content), len(content))
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path} is not a sound GGUF file: {error}") from error


def _check(reader: _Reader, size: int) -> None:
    if size < len(MAGIC) or bytes(reader.take(len(MAGIC))) != MAGIC:
        raise BadCheckpoint("it does not start with 'GGUF'")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise BadCheckpoint(f"its version is {version}: 2 and 3 are supported")
    num_tensors = reader.count(_MAX_TENSORS, "tensors")
    num_settings = reader.count(_MAX_SETTINGS, "settings")
    settings = _settings(reader, num_settings)
    extents = [_tensor(reader) for _ in range(num_tensors)]
    alignment = int(settings.get(_ALIGNMENT, 32))
    if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise BadCheckpoint(f"its alignment of {alignment} is no power of two")
    _check_places(extents, size - reader.position - (-reader.position % alignment))


def _settings(reader: _Reader, count: int) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    names: set[bytes] = set()
    for _ in range(count):
        name = reader.text()
        if name in names:
            raise BadCheckpoint(f"it says {_shown(name)} twice")
        names.add(name)
        value = reader.value(reader.number("I"))
        if value is None:
            continue
        key = name.decode(errors="replace")
        most = largest(key.rpartition(".")[2])
        if not -most <= value <= most:
            raise BadCheckpoint(f"it says {key[:100]!r}: {value}, at most {most} is expected")
        found[key] = value
    return found


def _tensor(reader: _Reader) -> tuple[str, int, int]:
    """Name, place and bytes of a tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = _shown(reader.text()[:_MAX_NAME])
    num_extents = reader.number("I")
    if not 1 <= num_extents <= _MAX_EXTENTS:
        raise BadCheckpoint(f"tensor {name} has {num_extents} extents")
    elements = math.prod(reader.number("Q") for _ in range(num_extents))
    kind, place = reader.number("I"), reader.number("Q")
    if kind not in {int(known) for known in GGMLQuantizationType}:
        raise BadCheckpoint(f"tensor {name} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if elements % block:
        raise BadCheckpoint(f"tensor {name} has {elements} elements, no multiple of {block}")
    return name, place, elements // block * block_bytes


def _check_places(tensors: list[tuple[str, int, int]], room: int) -> None:
    """No tensor lies upon another one, or beyond the file."""
    names: set[str] = set()
    end = 0
    for name, place, nbytes in sorted(tensors, key=lambda tensor: tensor[1]):
        if name in names:
            raise BadCheckpoint(f"it has the tensor {name} twice")
        names.add(name)
        if place < end:
            raise BadCheckpoint(f"tensor {name} overlaps another one")
        if place + nbytes > room:
            raise BadCheckpoint(f"tensor {name} ends after the file: it is truncated")
        end = place + nbytes


def _shown(name: bytes) -> str:
    return repr(name[:100].decode(errors="replace"))
