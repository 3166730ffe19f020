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


def serve(read: Callable[[], str]) -> None:
    offer = unpacked(json.loads(read()))
    inlet = inlet_of(offer)
    outlet = outlet_of(offer.kind, offer.slots, offer.slot_bytes)
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
