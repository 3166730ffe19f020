"""Where the numbers of weights come from: the zoo's objects, or random ones made on the device."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from workers.chains import UnservableChain
from zoo.dummy.store import DummyStore
from zoo.manifest import ObjectDigest
from zoo.store import ObjectInfo, Store

LoadFormat = Literal["auto", "dummy"]

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


class Weights(Protocol):
    """Tensors by their digests. Nobody writes to what `tensor` gives."""

    def info(self, digest: ObjectDigest) -> ObjectInfo:
        """What a tensor is, without making it."""
        ...

    def tensor(self, digest: ObjectDigest) -> Tensor:
        """A tensor in its stored precision, on any device. Raises ZooError, UnservableChain."""
        ...


class StoredWeights:
    """The objects of a store, mapped: tensors over its own read-only memory, without a copy."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def info(self, digest: ObjectDigest) -> ObjectInfo:
        """See `Weights`."""
        return self._store.info(digest)

    def tensor(self, digest: ObjectDigest) -> Tensor:
        """See `Weights`."""
        stored = self._store.tensor(digest)
        array = np.asarray(_Lent(stored.data))
        return torch.from_numpy(array).view(dtype_of(digest, stored.dtype)).view(stored.shape)


class DummyWeights:
    """Random tensors of the shapes that the catalog names, made on `device`, equal for equal
    digests.

    Vectors are ones. Matrices are normal with the deviation 1 / sqrt(longer side): no product makes
    its input larger, so activations stay finite however deep a model is.
    """

    def __init__(self, store: DummyStore, device: torch.device) -> None:
        self._store = store
        self._device = device

    def info(self, digest: ObjectDigest) -> ObjectInfo:
        """See `Weights`."""
        return self._store.info(digest)

    def tensor(self, digest: ObjectDigest) -> Tensor:
        """See `Weights`."""
        info = self._store.info(digest)
        dtype = dtype_of(digest, info.dtype)
        if not dtype.is_floating_point:
            return torch.arange(info.shape[0], dtype=dtype).view(info.shape)
        if len(info.shape) < 2:
            return torch.ones(info.shape, dtype=dtype, device=self._device)
        draw = torch.Generator(self._device).manual_seed(int(digest[:15], 16))
        made = torch.empty(info.shape, dtype=dtype, device=self._device)
        return made.normal_(0.0, max(info.shape) ** -0.5, generator=draw)


def open_weights(zoo: Path, load_format: LoadFormat, device: torch.device) -> Weights:
    """The weights of the zoo at that place, or random ones of their shapes."""
    if load_format == "dummy":
        return DummyWeights(DummyStore(zoo), device)
    return StoredWeights(Store(zoo))


def dtype_of(digest: ObjectDigest, name: str) -> torch.dtype:
    """What torch calls the data type of a stored tensor. Raises UnservableChain."""
    if name not in _DTYPES:
        raise UnservableChain(f"tensor {digest} is of dtype {name}, not a float")
    return _DTYPES[name]


class _Lent:
    """Read-only memory under numpy's protocol as if it were writable: torch warns of arrays that
    are not, and no kernel writes to weights."""

    def __init__(self, data: memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self.__array_interface__ = {
            "version": 3,
            "shape": self._data.shape,
            "typestr": "|u1",
            "data": (self._data.ctypes.data, False),
        }
