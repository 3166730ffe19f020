"""Links between two processes on GPUs of one host: device memory opened through CUDA IPC.

The sender copies into a slot on its stream and records the slot's event; the receiver's stream
waits on it, so nobody's host waits for a device. Order of closing: the inlet first, then the
outlet. A handle cannot be opened in the process that made it; there a plain copy serves.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from workers.links.link import LinkBroken, Offer

# Memory that is shared begins on a boundary of its own, so that nothing else is exported with it.
_GRAIN = 2 << 20


def _cuda() -> Any:  # noqa: ANN401 - cupy ships no types
    import cupy  # pyright: ignore[reportMissingImports] - an extra

    return cupy.cuda


class IpcOutlet:
    """Slots in this process's device memory; see `workers.links.link.Outlet`."""

    def __init__(self, slots: int, slot_bytes: int, device: int) -> None:
        cuda = _cuda()
        self._slot_bytes = slot_bytes
        with cuda.Device(device):
            size = -(-slots * slot_bytes // _GRAIN) * _GRAIN
            self._memory: Any = cuda.Memory(size)
            self._filled = [_event(cuda) for _ in range(slots)]
            self._slots = _as_tensor(self._memory, self._memory.ptr, slots, slot_bytes, device)
            self._offer = Offer(
                "ipc",
                slots,
                slot_bytes,
                cuda.runtime.deviceGetPCIBusId(device),
                cuda.runtime.ipcGetMemHandle(self._memory.ptr),
                tuple(cuda.runtime.ipcGetEventHandle(event.ptr) for event in self._filled),
            )

    @property
    def offer(self) -> Offer:
        return self._offer

    def put(self, slot: int, rows: Tensor) -> None:
        data = rows.contiguous().view(-1).view(torch.uint8)
        if len(data) > self._slot_bytes:
            raise ValueError(f"{len(data)} bytes for a slot of {self._slot_bytes}")
        try:
            self._slots[slot][: len(data)].copy_(data, non_blocking=True)
            stream = torch.cuda.current_stream(self._slots.device)
            _cuda().runtime.eventRecord(self._filled[slot].ptr, stream.cuda_stream)
        except RuntimeError as error:
            raise LinkBroken(f"slot {slot} cannot be filled: {error}") from error

    def close(self) -> None:
        self._slots = torch.empty(0, dtype=torch.uint8)
        self._filled = []
        self._memory = None


class IpcInlet:
    """Slots in another process's device memory; see `workers.links.link.Inlet`."""

    def __init__(self, offer: Offer, device: int) -> None:
        cuda = _cuda()
        self._runtime = cuda.runtime
        self._device = device
        self._base = 0
        self._events: list[int] = []
        try:
            with cuda.Device(device):
                self._base = self._runtime.ipcOpenMemHandle(offer.memory)
                self._events = [self._runtime.ipcOpenEventHandle(h) for h in offer.events]
        except cuda.runtime.CUDARuntimeError as error:
            self.close()
            raise LinkBroken(f"the slots on {offer.address} cannot be opened: {error}") from error
        self._slots = _as_tensor(self, self._base, offer.slots, offer.slot_bytes, device)
        self._used = [torch.cuda.Event() for _ in range(offer.slots)]

    def get(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stream = torch.cuda.current_stream(self._slots.device)
        self._runtime.streamWaitEvent(stream.cuda_stream, self._events[slot])
        size = math.prod(shape) * dtype.itemsize
        return self._slots[slot][:size].view(dtype).view(shape)

    def release(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self._slots.device))
        self._used[slot].synchronize()

    def close(self) -> None:
        cuda = _cuda()
        self._slots = torch.empty(0, dtype=torch.uint8)
        with contextlib.suppress(cuda.runtime.CUDARuntimeError), cuda.Device(self._device):
            for event in self._events:
                self._runtime.eventDestroy(event)
            self._events = []
            if self._base:
                self._runtime.ipcCloseMemHandle(self._base)
        self._base = 0


def _event(cuda: Any) -> Any:  # noqa: ANN401
    return cuda.Event(disable_timing=True, interprocess=True)


def _as_tensor(owner: object, pointer: int, slots: int, slot_bytes: int, device: int) -> Tensor:
    """Device memory as bytes [slots, slot_bytes], without a copy."""
    import cupy  # pyright: ignore[reportMissingImports] - an extra

    size = slots * slot_bytes
    memory = cupy.cuda.UnownedMemory(pointer, size, owner, device)
    flat = cupy.ndarray((size,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return torch.from_dlpack(flat).view(slots, slot_bytes)
