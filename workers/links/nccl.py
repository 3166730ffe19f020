"""Links between GPUs of two hosts: a pair of NCCL ranks, one sending and one receiving.

Making a communicator has no time-out of its own and can hang, so it runs in a thread with a
deadline; a pair that fails is aborted, never waited for. Bytes travel as bytes, whatever the dtype.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from workers.links.link import LinkBroken, LinkTimeout, Offer

SENDER, RECEIVER = 0, 1


def _nccl() -> Any:  # noqa: ANN401 - cupy ships no types
    from cupy.cuda import nccl  # pyright: ignore[reportMissingImports] - an extra

    if not nccl.available:
        raise LinkBroken("cupy finds no NCCL: install nvidia-nccl-cu13")
    return nccl


class _Pair:
    """A communicator of two ranks."""

    def __init__(self, name: tuple[int, ...], rank: int, device: int, timeout_s: float) -> None:
        self._nccl = _nccl()
        self.device = torch.device("cuda", device)
        self._made: list[Any] = []
        self._failure: list[Exception] = []
        thread = threading.Thread(target=self._make, args=(name, rank, device), daemon=True)
        thread.start()
        thread.join(timeout_s)
        if self._failure:
            raise LinkBroken(f"NCCL cannot connect: {self._failure[0]}") from self._failure[0]
        if not self._made:
            raise LinkTimeout(f"NCCL did not connect within {timeout_s:g} s")

    def _make(self, name: tuple[int, ...], rank: int, device: int) -> None:
        try:
            torch.cuda.set_device(device)
            self._made.append(self._nccl.NcclCommunicator(2, name, rank))
        except Exception as error:  # noqa: BLE001 - whatever it is, the waiting side must hear it
            self._failure.append(error)

    def move(self, data: Tensor, peer: int, *, sends: bool) -> None:
        """Queue the transfer of `data` (bytes) on the current stream."""
        communicator = self._made[0]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        act = communicator.send if sends else communicator.recv
        try:
            act(data.data_ptr(), len(data), self._nccl.NCCL_UINT8, peer, stream)
            communicator.check_async_error()
        except self._nccl.NcclError as error:
            self.abort()
            raise LinkBroken(f"NCCL lost its peer: {error}") from error

    def abort(self) -> None:
        """End the pair at once; what is under way is lost."""
        while self._made:
            self._made.pop().abort()


class NcclOutlet:
    """The sending rank; a slot is a buffer that is still being sent."""

    def __init__(
        self, slots: int, slot_bytes: int, device: int, name: bytes, timeout_s: float
    ) -> None:
        self._pair = _Pair(_unpacked(name), SENDER, device, timeout_s)
        self._slots = torch.empty((slots, slot_bytes), dtype=torch.uint8, device=self._pair.device)
        self._offer = Offer("nccl", slots, slot_bytes, memory=name)

    @property
    def offer(self) -> Offer:
        return self._offer

    def put(self, slot: int, rows: Tensor) -> None:
        data = rows.contiguous().view(-1).view(torch.uint8)
        if len(data) > self._offer.slot_bytes:
            raise ValueError(f"{len(data)} bytes for a slot of {self._offer.slot_bytes}")
        kept = self._slots[slot][: len(data)]
        kept.copy_(data, non_blocking=True)
        self._pair.move(kept, RECEIVER, sends=True)

    def close(self) -> None:
        self._pair.abort()


class NcclInlet:
    """The receiving rank; `get` queues the receipt, in the order of the announcements."""

    def __init__(self, offer: Offer, device: int, timeout_s: float) -> None:
        self._pair = _Pair(_unpacked(offer.memory), RECEIVER, device, timeout_s)
        self._slots = torch.empty(
            (offer.slots, offer.slot_bytes), dtype=torch.uint8, device=self._pair.device
        )

    def get(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        kept = self._slots[slot][: math.prod(shape) * dtype.itemsize]
        self._pair.move(kept, SENDER, sends=False)
        return kept.view(dtype).view(shape)

    def release(self, slot: int) -> None:
        torch.cuda.current_stream(self._pair.device).synchronize()

    def close(self) -> None:
        self._pair.abort()


def new_name() -> bytes:
    """A name under which two ranks find each other."""
    return bytes(value & 0xFF for value in _nccl().get_unique_id())


def _unpacked(name: bytes) -> tuple[int, ...]:
    """A name as cupy gives and takes it: signed characters."""
    return tuple(value - 256 if value > 127 else value for value in name)
