"""The other process of a link's tests: sends back what it gets, over slots of its own.

Lines of JSON on stdin and stdout: first the offers, then announcements [slot, sequence, shape] and
credits {"credit": [slot, sequence]}."""

import json
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from workers.links.link import Inlet, Offer, Outlet
from workers.links.slots import Incoming, Outgoing

PATIENCE_S = 60.0


def outlet_of(kind: str, slots: int, slot_bytes: int) -> Outlet:
    if kind == "ipc":
        from workers.links.ipc import IpcOutlet

        return IpcOutlet(slots, slot_bytes, 0)
    from workers.links.host import HostOutlet

    return HostOutlet(slots, slot_bytes)


def inlet_of(offer: Offer) -> Inlet:
    if offer.kind == "ipc":
        from workers.links.ipc import IpcInlet

        return IpcInlet(offer, 0)
    from workers.links.host import HostInlet

    return HostInlet(offer)


def packed(offer: Offer) -> str:
    return msgspec.msgpack.encode(offer).hex()


def unpacked(text: str) -> Offer:
    return msgspec.msgpack.decode(bytes.fromhex(text), type=Offer)


def say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def ends_of(offer: Offer, read: Callable[[], str]) -> tuple[Inlet, Outlet]:
    """The inlet of an offer, and an outlet of the same kind; NCCL's have a second name."""
    if offer.kind == "nccl":
        from workers.links.nccl import NcclInlet, NcclOutlet

        back = unpacked(json.loads(read()))
        device = torch.cuda.device_count() - 1
        inlet = NcclInlet(offer, device, PATIENCE_S)
        name = back.memory
        return inlet, NcclOutlet(offer.slots, offer.slot_bytes, device, name, PATIENCE_S)
    return inlet_of(offer), outlet_of(offer.kind, offer.slots, offer.slot_bytes)


def serve(read: Callable[[], str]) -> None:
    offer = unpacked(json.loads(read()))
    inlet, outlet = ends_of(offer, read)
    say(packed(outlet.offer))
    going, coming = Outgoing(offer.slots), Incoming(offer.slots)
    while line := read():
        message = json.loads(line)
        if isinstance(message, dict):
            going.credit(*message["credit"])
            continue
        slot, sequence, shape = message
        coming.arrive(slot, sequence)
        rows = inlet.get(slot, tuple(shape), torch.float32)
        taken = going.take()
        assert taken is not None
        outlet.put(taken[0], rows + 1)
        inlet.release(slot)
        say({"credit": coming.release(slot)})
        say([*taken, shape])
    inlet.close()
    outlet.close()


if __name__ == "__main__":
    serve(sys.stdin.readline)
