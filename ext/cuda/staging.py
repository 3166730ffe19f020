"""Weights on their way to the device: through pinned memory, on a stream of their own.

While one piece travels the next is copied out of the mapped file, so neither waits for the other,
and kernels of other streams run on meanwhile.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE_BYTES = 32 << 20
_PIECES = 3


class Staging:
    """Copies host tensors to one device, for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pieces: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turns = itertools.count()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Copies made within this go over the stream of their own and are done when it ends. Raises
        MemoryError where the device has no room for them."""
        # A thread begins on the first device.
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"{self._device} has no memory left for it") from error
            finally:
                self._stream.synchronize()

    def copy(self, source: Tensor) -> Tensor:
        """A contiguous copy on the device, ready for the stream in force."""
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        if source.device.type != "cpu":
            return target.copy_(source)
        given = source.contiguous().view(-1).view(torch.uint8)
        room = target.view(-1).view(torch.uint8)
        for start in range(0, len(given), _PIECE_BYTES):
            part = given[start : start + _PIECE_BYTES]
            piece, sent = self._piece()
            piece[: len(part)].copy_(part)
            room[start : start + len(part)].copy_(piece[: len(part)], non_blocking=True)
            sent.record()
        return target

    def _piece(self) -> tuple[Tensor, torch.cuda.Event]:
        """The next piece of pinned memory, once what was in it has been sent."""
        if len(self._pieces) < _PIECES:
            piece = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._pieces.append((piece, torch.cuda.Event()))
        piece, sent = self._pieces[next(self._turns) % len(self._pieces)]
        sent.synchronize()
        return piece, sent
