"""Small host arrays that lie together on the device, so that all of them travel in one copy."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

# Shape and data type of an array.
Spec = tuple[tuple[int, ...], type[np.generic]]

# Kernels are compiled for addresses on this boundary: none is to be compiled again for others.
_GRAIN = 16
_TYPES = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


class Parcel:
    """Room for arrays of given shapes. `inside` are the host's, to be filled; `outside` the
    device's, at addresses that stay; they hold what was inside at the last `send`."""

    def __init__(self, specs: Sequence[Spec], device: torch.device) -> None:
        sizes = [int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in specs]
        ends = [0, *accumulate(-(-size // _GRAIN) * _GRAIN for size in sizes)]
        self._host = np.zeros(ends[-1], np.uint8)
        self._buffer = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        self.inside: list[np.ndarray] = []
        self.outside: list[Tensor] = []
        for (shape, kind), start, size in zip(specs, ends, sizes, strict=False):
            part = slice(start, start + size)
            self.inside.append(self._host[part].view(kind).reshape(shape))
            self.outside.append(self._buffer[part].view(_TYPES[kind]).view(shape))

    def clear(self) -> None:
        """Zeros inside."""
        self._host.fill(0)

    def send(self) -> None:
        """Copy what is inside to the device; the host does not wait for it."""
        if len(self._host):
            self._buffer.copy_(staged(self._host, self._buffer.device), non_blocking=True)


def staged(array: np.ndarray, device: torch.device) -> Tensor:
    """A host copy from which the device reads on its own; the array itself where the device is the
    host."""
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    return staged(np.ascontiguousarray(array), device).to(device, non_blocking=True)
