"""The tensors of a source folder: safetensors, in one file or in shards, mapped and not copied.

Pickle files are never opened. Used for checkpoints and for adapters; what the tensors mean is
theirs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from zoo.errors import BadCheckpoint, BadTensorFile
from zoo.sources.inside import checked_place
from zoo.sources.strictjson import check_json
from zoo.sources.tensorfile import TensorFile

FLOATS = ("F32", "BF16", "F16")
MAX_INDEX_BYTES = 64 << 20
MAX_FILE_NAME = 255
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SLICE_ITEMS = 1 << 22


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source: dtype in safetensors' names, little-endian bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class _Index(msgspec.Struct, frozen=True):
    """A sharded checkpoint's index: tensor name -> file."""

    weight_map: dict[str, str]


def read_weights(folder: Path, stem: str) -> dict[str, SourceTensor]:
    """All tensors of `stem`.safetensors or of its shards; raises BadCheckpoint or BadTensorFile."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _read_shards(folder, checked_place(folder, index))
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return _tensors(TensorFile(checked_place(folder, single)))
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise BadCheckpoint(
            f"{folder} has its weights in {pickles[0]}, a pickle file, which can run code when "
            "it is read: save them as safetensors first"
        )
    raise BadCheckpoint(f"{folder} has no {stem}.safetensors")


def is_finite(tensor: SourceTensor) -> bool:
    """Whether no element is NaN or infinite. Looks at slices, so that no large copy is made."""
    if tensor.dtype == "BF16":
        patterns = np.frombuffer(tensor.data, np.dtype("<u2"))
        return all((part & 0x7F80 != 0x7F80).all() for part in _slices(patterns))
    kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(tensor.dtype)
    if kind is None:
        return True
    return all(np.isfinite(part).all() for part in _slices(np.frombuffer(tensor.data, kind)))


def is_zero(tensor: SourceTensor) -> bool:
    """Whether every element of a float tensor is zero, of either sign."""
    kind = {"F32": ("<u4", 0x7FFFFFFF), "BF16": ("<u2", 0x7FFF), "F16": ("<u2", 0x7FFF)}
    pattern, magnitude = kind[tensor.dtype]
    return not any(
        (part & magnitude).any() for part in _slices(np.frombuffer(tensor.data, pattern))
    )


def check_finite(source: str, name: str, tensor: SourceTensor) -> None:
    """Refuse weights that no model can have been saved with on purpose."""
    if not is_finite(tensor):
        raise BadCheckpoint(f"tensor {name!r} of {source} holds NaN or infinite values")


def _slices(values: np.ndarray) -> Iterable[np.ndarray]:
    return (values[at : at + _SLICE_ITEMS] for at in range(0, len(values), _SLICE_ITEMS))


def _tensors(file: TensorFile) -> dict[str, SourceTensor]:
    return {
        name: SourceTensor(entry.dtype, entry.shape, file.data(name))
        for name, entry in file.entries.items()
    }


def _read_shards(folder: Path, index: Path) -> dict[str, SourceTensor]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise BadCheckpoint(f"{index} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = msgspec.convert(check_json(index.read_bytes()), _Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{index} is not a valid index: {error}") from error
    found: dict[str, SourceTensor] = {}
    for name in sorted(set(weight_map.values())):
        if (
            not name
            or Path(name).name != name
            or "\0" in name
            or len(name.encode()) > MAX_FILE_NAME
        ):
            raise BadCheckpoint(f"{index} names {name[:200]!r}, which is not a file beside it")
        try:
            tensors = _tensors(TensorFile(checked_place(folder, folder / name)))
        except BadTensorFile as error:
            raise BadTensorFile(f"shard {name}: {error}") from error
        for tensor in tensors:
            if weight_map.get(tensor) != name:
                raise BadCheckpoint(f"{folder / name} holds {tensor!r}, which {index.name} denies")
        found |= tensors
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise BadCheckpoint(f"{folder / name} lacks {tensor!r}, which {index.name} promises")
    return {tensor: found[tensor] for tensor in weight_map}
