"""Links through the memory of one host: what machines without GPUs use, and what the protocol's
tests run on.

The slots lie in an anonymous file that lives as long as a process has it open, so nothing is left
behind by a process that was killed. The inlet opens it under the owner's /proc entry.
"""

import math
import mmap
import os

import torch
from torch import Tensor

from workers.links.link import LinkBroken, Offer


class HostOutlet:
    """Slots in memory of this process; see `workers.links.link.Outlet`."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._file = os.memfd_create("blockllm-link", os.MFD_CLOEXEC)
        os.ftruncate(self._file, slots * slot_bytes)
        self._memory = mmap.mmap(self._file, slots * slot_bytes)
        self._slots = _slots(self._memory, slots)
        address = f"/proc/{os.getpid()}/fd/{self._file}"
        self._offer = Offer("host", slots, slot_bytes, address)

    @property
    def offer(self) -> Offer:
        return self._offer

    def put(self, slot: int, rows: Tensor) -> None:
        data = _bytes(rows)
        if len(data) > self._offer.slot_bytes:
            raise ValueError(f"{len(data)} bytes for a slot of {self._offer.slot_bytes}")
        self._slots[slot][: len(data)] = data

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class HostInlet:
    """Slots in memory of another process of this host; see `workers.links.link.Inlet`."""

    def __init__(self, offer: Offer) -> None:
        try:
            file = os.open(offer.address, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LinkBroken(f"the slots at {offer.address} are gone: {error.strerror}") from error
        try:
            size = os.fstat(file).st_size
            if size != offer.slots * offer.slot_bytes:
                raise LinkBroken(f"{offer.address} has {size} bytes, not those that were offered")
            self._memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._slots = _slots(self._memory, offer.slots)

    def get(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        return self._slots[slot][:size].view(dtype).view(shape)

    def release(self, slot: int) -> None:
        pass  # The credit itself says so.

    def close(self) -> None:
        self._slots = torch.empty(0, 0, dtype=torch.uint8)


def _slots(memory: mmap.mmap, count: int) -> Tensor:
    """A mapping as bytes [slots, slot_bytes]."""
    return torch.frombuffer(memory, dtype=torch.uint8).view(count, -1)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(-1).view(torch.uint8)
