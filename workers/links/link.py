"""How activations cross from one worker to another: the two ends of a link, whatever carries it.

An outlet owns its slots and offers them; the inlet opens the offer. Announcements and credits go
over the workers' own sockets (`workers.wire`: Activation, Credit), so an end never waits here
longer than `timeout_s`, and a peer's death is noticed there. Memory is bounded: slots are
allocated once, and a sender without credits waits.
"""

from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor


class LinkBroken(Exception):
    """The other end is gone or the transport failed; the link is to be closed and made anew."""


class LinkTimeout(LinkBroken):
    """The transport did not finish in time."""


class Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an inlet needs to open an outlet's slots. `address` is the host memory's file, the
    device's PCI bus id, or nothing; `memory` and `events` are handles of the transport: one for
    all slots, and one per slot."""

    kind: Literal["host", "ipc", "nccl"]
    slots: int
    slot_bytes: int
    address: str = ""
    memory: bytes = b""
    events: tuple[bytes, ...] = ()


class Outlet(Protocol):
    """The sending end."""

    @property
    def offer(self) -> Offer:
        """What the inlet opens."""
        ...

    def put(self, slot: int, rows: Tensor) -> None:
        """Copy rows (contiguous, at most `slot_bytes`) into a slot, in the order of the device's
        work; announce it only after this returns. Raises LinkBroken."""
        ...

    def close(self) -> None:
        """Free the slots, after the inlet has closed; closing twice is harmless."""
        ...


class Inlet(Protocol):
    """The receiving end."""

    def get(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The rows in an announced slot, ready for work that is queued from now on; they may be a
        view of the slot until it is released."""
        ...

    def release(self, slot: int) -> None:
        """Be done with a slot once the work queued so far is; send the credit after this."""
        ...

    def close(self) -> None:
        """Let go of the slots; closing twice is harmless."""
        ...
