"""Writing one safetensors file, every tensor aligned to its own elements."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from zoo.progress import Progress
from zoo.sources.tensorfile import ALIGNMENT, ITEM_BYTES, Entry
from zoo.sources.weights import SourceTensor


def write_tensors(path: Path, tensors: Mapping[str, SourceTensor], progress: Progress) -> None:
    """Write the file, which must not be there; wide elements first. Raises OSError."""
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        nbytes = tensor.data.nbytes
        header[name] = Entry(tensor.dtype, tensor.shape, (position, position + nbytes))
        position += nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in progress.track(order, f"writing {path.name}"):
            file.write(tensors[name].data)
        file.flush()
        os.fsync(file.fileno())
