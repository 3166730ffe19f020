"""Weights as the native CPU kernels read them: packed into panels, or kept in rows.

Panels are described in ext/cpu/panel.h, tiles in ext/cpu/tiles.h, what folds both in
ext/cpu/folded.h, panels of codes in ext/cpu/grouped.h. Nothing is lost here: every element can be
had back, bit by bit.
A matrix is packed by the thread that asks: whoever has several to pack asks from several threads,
and never takes a turn of the pool that a step runs on.
"""

import ctypes
import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.memory import Arena
from ext.quantize import Quantized


@dataclass(eq=False, slots=True)
class CpuMatrix:
    """A packed weight: panels or tiles in `memory`, and the record that describes them. Where
    `is_coded`, products alone can read it."""

    out_features: int
    in_features: int
    nbytes: int
    memory: np.ndarray
    record: native.Record
    is_coded: bool = False


class Packing:
    """Packs weights into memory of its own; `layout` names what becomes of one, so that packed
    forms that were kept are taken up again only where they fit."""

    def __init__(self, library: ctypes.CDLL, isa: str, rounding: bool) -> None:
        self._native = library
        self._arena = Arena()
        self.panel: int = library.blockllm_panel()
        self._storage = native.STORAGE | {torch.bfloat16: library.blockllm_bf16_storage(rounding)}
        self.layout = f"{isa}-{self._fingerprint()}"

    def matrix(self, weight: Tensor) -> CpuMatrix:
        """A linear layer's weight [out, in]."""
        out, width = weight.shape
        matrix = self.reserve(out, width, weight.dtype)
        self.fill(matrix, weight)
        return matrix

    def reserve(self, out: int, width: int, dtype: torch.dtype) -> CpuMatrix:
        """A matrix [out, width] without its weights, which takes no memory yet."""
        _check(dtype, (out, width))
        record = native.Record(native.MATRIX.pack(0, out, width, self._storage[dtype]))
        return CpuMatrix(out, width, 0, np.empty(0, np.uint8), record)

    def over(self, memory: np.ndarray, out: int, width: int, dtype: torch.dtype) -> CpuMatrix:
        """A matrix [out, width] whose packed bytes are `memory`, which may be read-only."""
        matrix, storage = self.reserve(out, width, dtype), self._storage[dtype]
        most = self._native.blockllm_packed_bytes(out, width, storage)
        if memory.nbytes > most or (memory.nbytes < most and storage not in native.FOLDED):
            raise ValueError(f"{memory.nbytes} bytes are no matrix of {out} x {width} {dtype}")
        self.move(matrix, memory)
        return matrix

    def copy(self, matrix: CpuMatrix) -> np.ndarray:
        """Memory of our own with the bytes of a matrix; any thread may."""
        memory = self._arena.take(matrix.nbytes)
        np.copyto(memory, matrix.memory)
        return memory

    def move(self, matrix: CpuMatrix, memory: np.ndarray) -> None:
        """Let a matrix lie in `memory`, which has its bytes, while no operation reads it."""
        struct.pack_into("Q", matrix.record.data, 0, memory.ctypes.data)
        matrix.memory, matrix.nbytes = memory, memory.nbytes

    def fill(self, matrix: CpuMatrix, weight: Tensor) -> None:
        """Put a weight into the matrix that was reserved for it; any thread may."""
        if weight.shape != (matrix.out_features, matrix.in_features):
            raise ValueError(
                f"a weight of {tuple(weight.shape)} for a matrix of "
                f"{matrix.out_features} x {matrix.in_features}"
            )
        self.move(matrix, self._packed(weight, self._storage[weight.dtype]))

    def coded(self, weight: Quantized) -> CpuMatrix:
        """A linear layer's weight as codes."""
        out, width = len(weight.codes), weight.width
        heads = [weight.scales] if weight.offsets is None else [weight.scales, weight.offsets]
        head = self._in_panels(torch.stack(heads, 1)).permute(0, 3, 2, 1)
        codes = self._in_panels(weight.codes).permute(0, 2, 3, 1)
        if weight.bits == "int4":
            low, high = codes.unflatten(3, (2, -1)).unbind(3)
            codes = low | high << 4
        parts = [part.contiguous().view(torch.uint8).flatten(2) for part in (head, codes)]
        memory = self._arena.take(sum(part.numel() for part in parts))
        torch.cat(parts, 2, out=torch.from_numpy(memory).view(*parts[0].shape[:2], -1))
        view = (memory.ctypes.data, out, width, native.CODES[weight.bits])
        record = native.Record(native.MATRIX.pack(*view))
        return CpuMatrix(out, width, memory.nbytes, memory, record, is_coded=True)

    def _in_panels(self, rows: Tensor) -> Tensor:
        """[out, ...] -> [panels, outputs of a panel, ...], the last panel filled up with zeros."""
        missing = -len(rows) % self.panel
        if missing:
            rows = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
        return rows.unflatten(0, (-1, self.panel))

    def factor(self, weight: Tensor) -> Tensor:
        """A low-rank matrix: one that is taller than wide in panels, another in rows [rank, in]."""
        if weight.shape[0] > weight.shape[1]:
            return self.panels(weight)
        _check(weight.dtype, tuple(weight.shape))
        rows = torch.from_numpy(self._arena.take(weight.nbytes)).view(weight.dtype)
        return rows.view(weight.shape).copy_(weight)

    def panels(self, weight: Tensor) -> Tensor:
        """[out, in] -> [panels, in, outputs of a panel]."""
        _check(weight.dtype, tuple(weight.shape))
        width, storage = weight.shape[1], native.STORAGE[weight.dtype]
        packed = torch.from_numpy(self._packed(weight, storage)).view(weight.dtype)
        return packed.view(-1, width, self.panel)

    def rows(self, panels: Tensor, count: int) -> Tensor:
        """The first `count` rows of a matrix in panels."""
        if panels.dtype is torch.bfloat16:
            pairs = panels.unflatten(2, (self.panel // 2, 2))
            return pairs.permute(0, 3, 2, 1).flatten(0, 2)[:count]
        return panels.permute(0, 2, 1).flatten(0, 1)[:count]

    def _packed(self, weight: Tensor, storage: int) -> np.ndarray:
        """The bytes of a matrix [out, in], packed."""
        most = self._native.blockllm_packed_bytes(*weight.shape, storage)
        if storage not in native.FOLDED:
            memory = self._arena.take(most)
            self._pack(weight, storage, memory)
            return memory
        room = np.zeros(most, np.uint8)
        nbytes = self._pack(weight, storage, room)
        memory = self._arena.take(nbytes)
        np.copyto(memory, room[:nbytes])
        return memory

    def _pack(self, weight: Tensor, storage: int, memory: np.ndarray) -> int:
        """Write a matrix [out, in], packed; returns how many bytes that took."""
        view = (memory.ctypes.data, *weight.shape, storage)
        packing = native.PACKING.pack(*view, weight.data_ptr(), *weight.stride())
        return self._native.blockllm_pack(packing)

    def _fingerprint(self) -> str:
        """What packing does, in eight digits: taken of packed matrices of several panels, so that
        it changes whenever these do. Nearly all elements differ; of those of bfloat16 the narrow
        one folds, and has a few in each block that do so beside the others."""
        out, sha = 6 * self.panel - 5, hashlib.sha256()
        for width in (62, 70):
            bits = torch.arange(out * width, dtype=torch.int32)
            bits[::257] *= 4099
            for dtype in native.STORAGE:
                whole = bits if dtype.itemsize == 4 else bits.to(torch.int16)
                sha.update(self.matrix(whole.view(dtype).view(out, width)).memory.data)
        return sha.hexdigest()[:8]


def _check(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if dtype not in native.STORAGE:
        raise ValueError(f"weights must be float32, float16 or bfloat16, not {dtype}")
    if 0 in shape:
        raise ValueError(f"a matrix of {shape} has no weights")
