"""Stored numbers as float32 arrays and back: what is computed once, when an adapter comes in."""

from typing import Protocol

import numpy as np

from zoo.sources.weights import SourceTensor

_KINDS = {"F32": "<f4", "F16": "<f2"}
_NAMES = {"float32": "F32", "int64": "I64"}


class Numbers(Protocol):
    """A tensor of a source or of the store."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def data(self) -> memoryview: ...


def read_values(tensor: Numbers) -> np.ndarray:
    """A copy in float32, without loss."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    values = np.frombuffer(tensor.data, _KINDS[tensor.dtype])
    return values.astype(np.float32).reshape(tensor.shape)


def as_tensor(values: np.ndarray) -> SourceTensor:
    """A computed array as if a source had held it."""
    whole = np.ascontiguousarray(values)
    return SourceTensor(_NAMES[whole.dtype.name], whole.shape, whole.data.cast("B"))
