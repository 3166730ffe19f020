"""Weights that left the device, in pinned host memory: they come back by copies alone.

Memory is taken in slabs as it is needed and handed out in pieces of one size, so nothing is ever in
the way of anything; what was least recently wanted leaves for others. Weights never change, so what
came back stays kept, and leaves the device again without a copy. One thread at a time.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ext.plain import DenseMatrix

_log = logging.getLogger(__name__)

PIECE_BYTES = 2 << 20
# The allocator of pinned memory rounds up to powers of two.
_SLAB_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor's bytes: all pieces are full but the last."""

    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    pieces: list[Tensor]


class Parked:
    """Copies of one device's matrices, at most `limit_bytes`. Copies are queued on the stream in
    force: whoever parks and recalls does both on one (`ext.cuda.staging`)."""

    def __init__(
        self, limit_bytes: int, device: torch.device, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._unclaimed = limit_bytes // piece_bytes
        self._free: list[Tensor] = []
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.recalled = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of pieces in use."""
        return self._piece_bytes * sum(len(kept.pieces) for kept in self._kept.values())

    def park(self, key: Hashable, value: object) -> bool:
        """Keep a copy under that key, if `value` is a matrix and there can be room for it."""
        if not isinstance(value, DenseMatrix):
            return False
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        data = value.data
        pieces = self._take(-(-value.nbytes // self._piece_bytes))
        if pieces is None:
            return False
        for piece, part in zip(pieces, _bytes(data).split(self._piece_bytes), strict=True):
            piece[: len(part)].copy_(part, non_blocking=True)
        self._kept[key] = _Kept(data.shape, data.dtype, value.nbytes, pieces)
        return True

    def recall(self, key: Hashable) -> DenseMatrix | None:
        """What was parked under that key, on the device; None if it was not, or has left."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        data = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        for piece, part in zip(kept.pieces, _bytes(data).split(self._piece_bytes), strict=True):
            part.copy_(piece[: len(part)], non_blocking=True)
        self.recalled += 1
        return DenseMatrix(data)

    def _take(self, count: int) -> list[Tensor] | None:
        """Pieces of memory; None if there are not so many, whatever leaves."""
        held = sum(len(kept.pieces) for kept in self._kept.values())
        if count > held + len(self._free) + self._unclaimed:
            return None
        while len(self._free) < count and self._unclaimed:
            self._claim()
        if count > held + len(self._free):
            return None
        while len(self._free) < count:
            _, oldest = self._kept.popitem(last=False)
            self._free.extend(oldest.pieces)
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def _claim(self) -> None:
        """One slab more, or no more of them where the system has no memory to pin."""
        count = min(self._unclaimed, max(1, _SLAB_BYTES // self._piece_bytes))
        pinned = self._device.type == "cuda"
        try:
            slab = torch.empty(count * self._piece_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            _log.warning("no more host memory for weights that leave the device: %s", error)
            self._unclaimed = 0
            return
        self._unclaimed -= count
        self._free.extend(slab.split(self._piece_bytes))


def _bytes(data: Tensor) -> Tensor:
    return data.contiguous().view(-1).view(torch.uint8)
