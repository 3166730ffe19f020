"""Weights as the native CPU kernels read them: packed into panels, or kept in rows.

Panels are described in ext/cpu/panel.h, AMX's tiles in ext/cpu/amx.h. Nothing is lost: elements
keep their stored 2 or 4 bytes.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.memory import Arena


@dataclass(eq=False, slots=True)
class CpuMatrix:
    """A packed weight: panels or tiles in `memory`, and the record that describes them."""

    out_features: int
    in_features: int
    nbytes: int
    memory: np.ndarray
    record: native.Record


class Packing:
    """Packs weights with the threads of `pool` into memory of its own."""

    def __init__(self, library: ctypes.CDLL, pool: ctypes.c_void_p) -> None:
        self._native = library
        self._pool = pool
        self._arena = Arena()
        self.panel: int = library.blockllm_panel()
        self._storage = native.STORAGE | {torch.bfloat16: library.blockllm_bf16_storage()}

    def matrix(self, weight: Tensor) -> CpuMatrix:
        """A linear layer's weight [out, in]."""
        _check(weight)
        out, width = weight.shape
        storage = self._storage[weight.dtype]
        memory = self._pack(weight, storage)
        record = native.Record(native.MATRIX.pack(memory.ctypes.data, out, width, storage))
        return CpuMatrix(out, width, memory.nbytes, memory, record)

    def factor(self, weight: Tensor) -> Tensor:
        """A low-rank matrix: one that is taller than wide in panels, another in rows [rank, in]."""
        if weight.shape[0] > weight.shape[1]:
            return self.panels(weight)
        _check(weight)
        rows = torch.from_numpy(self._arena.take(weight.nbytes)).view(weight.dtype)
        return rows.view(weight.shape).copy_(weight)

    def panels(self, weight: Tensor) -> Tensor:
        """[out, in] -> [panels, in, outputs of a panel]."""
        _check(weight)
        packed = torch.from_numpy(self._pack(weight, native.STORAGE[weight.dtype]))
        packed = packed.view(weight.dtype)
        return packed.view(-1, weight.shape[1], self.panel)

    def rows(self, panels: Tensor, count: int) -> Tensor:
        """The first `count` rows of a matrix in panels."""
        if panels.dtype is torch.bfloat16:
            pairs = panels.unflatten(2, (self.panel // 2, 2))
            return pairs.permute(0, 3, 2, 1).flatten(0, 2)[:count]
        return panels.permute(0, 2, 1).flatten(0, 1)[:count]

    def _pack(self, weight: Tensor, storage: int) -> np.ndarray:
        """The bytes of a matrix [out, in], packed."""
        out, width = weight.shape
        memory = self._arena.take(self._native.blockllm_packed_bytes(out, width, storage))
        view = (memory.ctypes.data, out, width, storage)
        packing = native.PACKING.pack(*view, weight.data_ptr(), *weight.stride())
        self._native.blockllm_pack(self._pool, packing)
        return memory


def _check(weight: Tensor) -> None:
    if weight.dtype not in native.STORAGE:
        raise ValueError(f"weights must be float32, float16 or bfloat16, not {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"a matrix of {tuple(weight.shape)} has no weights")
