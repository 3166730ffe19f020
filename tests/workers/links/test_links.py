"""Links between two processes: every byte arrives, in order, and a peer's end is noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.workers.links.echo import PATIENCE_S, inlet_of, outlet_of, packed, unpacked
from workers.links.host import HostInlet, HostOutlet
from workers.links.link import Inlet, LinkBroken, LinkTimeout, Offer, Outlet
from workers.links.slots import Incoming, Outgoing

ROOT = Path(__file__).parents[3]
SLOTS, SLOT_BYTES = 3, 1 << 16
KINDS = ["host", pytest.param("ipc", marks=pytest.mark.gpu)]


class Peer:
    """An echoing process and this side's two ends."""

    def __init__(self, kind: str, **environment: str) -> None:
        self.kind = kind
        self.device = "cpu" if kind == "host" else "cuda"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.links.echo"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.outlet, self.inlet = self.nccl() if kind == "nccl" else self.slotted()
        self.going, self.coming = Outgoing(SLOTS), Incoming(SLOTS)

    def slotted(self) -> tuple[Outlet, Inlet]:
        """Ends of which each opens the other's slots."""
        outlet = outlet_of(self.kind, SLOTS, SLOT_BYTES)
        self.say(packed(outlet.offer))
        return outlet, inlet_of(unpacked(self.hear()))

    def nccl(self) -> tuple[Outlet, Inlet]:
        """Two pairs of ranks, one for each direction; both sides make one after the other."""
        from workers.links.nccl import NcclInlet, NcclOutlet, new_name

        there, back = (Offer("nccl", SLOTS, SLOT_BYTES, memory=new_name()) for _ in range(2))
        self.say(packed(there))
        self.say(packed(back))
        try:
            outlet = NcclOutlet(SLOTS, SLOT_BYTES, 0, there.memory, PATIENCE_S)
            inlet = NcclInlet(back, 0, PATIENCE_S)
            self.hear()
        except LinkBroken:
            self.process.kill()
            self.close()
            raise
        return outlet, inlet

    def say(self, message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise LinkBroken("the peer is gone")
        return json.loads(line)

    def send(self, rows: torch.Tensor) -> None:
        taken = self.going.take()
        assert taken is not None
        self.outlet.put(taken[0], rows)
        self.say([*taken, list(rows.shape)])

    def receive(self) -> torch.Tensor:
        while True:
            message = self.hear()
            if isinstance(message, dict):
                slot, sequence = message["credit"]
                self.going.credit(slot, sequence)
                continue
            slot, sequence, shape = message
            self.coming.arrive(slot, sequence)
            rows = self.inlet.get(slot, tuple(shape), torch.float32).clone()
            self.inlet.release(slot)
            self.say({"credit": self.coming.release(slot)})
            return rows

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture(params=KINDS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    peer = Peer(request.param)
    yield peer
    peer.close()


def test_a_thousand_round_trips_of_several_at_once(peer: Peer) -> None:
    torch.manual_seed(0)
    waiting: list[torch.Tensor] = []
    for number in range(1000):
        rows = torch.randn(1 + number % 13, 64, device=peer.device)
        peer.send(rows)
        waiting.append(rows)
        if len(waiting) == SLOTS:
            assert torch.equal(peer.receive(), waiting.pop(0) + 1)
    for rows in waiting:
        assert torch.equal(peer.receive(), rows + 1)


def test_ends_may_close_in_any_order_and_twice(peer: Peer) -> None:
    peer.send(torch.ones(2, 8, device=peer.device))
    assert torch.equal(peer.receive().cpu(), torch.full((2, 8), 2.0))
    # The wrong order: slots are freed that the other process still has open.
    peer.outlet.close()
    peer.inlet.close()
    peer.outlet.close()
    peer.inlet.close()
    peer.close()
    assert peer.process.returncode == 0


def test_a_killed_peer_breaks_the_link_and_leaves_nothing(peer: Peer) -> None:
    peer.send(torch.ones(2, 8, device=peer.device))
    peer.receive()
    peer.process.send_signal(signal.SIGKILL)
    peer.process.wait(20)
    with pytest.raises(LinkBroken, match="the peer is gone"):
        peer.receive()
    if peer.device == "cpu":
        # What it had sent is still there; of a device's memory nothing says so.
        assert torch.equal(peer.inlet.get(0, (2, 8), torch.float32), torch.full((2, 8), 2.0))
    peer.inlet.close()
    peer.outlet.close()
    other = Peer(peer.kind)
    other.send(torch.ones(2, 8, device=other.device))
    assert torch.equal(other.receive().cpu(), torch.full((2, 8), 2.0))
    other.close()


def test_rows_larger_than_a_slot_are_refused(peer: Peer) -> None:
    with pytest.raises(ValueError, match=f"for a slot of {SLOT_BYTES}"):
        peer.outlet.put(0, torch.ones(SLOT_BYTES, device=peer.device))


def test_an_offer_of_a_process_that_ended_is_refused() -> None:
    outlet = HostOutlet(SLOTS, SLOT_BYTES)
    offer = outlet.offer
    outlet.close()
    with pytest.raises(LinkBroken, match="are gone"):
        HostInlet(offer)


@pytest.mark.gpu
@pytest.mark.timeout(200)
def test_two_nccl_ranks_exchange_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    try:
        # A host of its own: NCCL refuses two ranks of one host on one device.
        peer = Peer("nccl", NCCL_HOSTID="another")
    except LinkBroken as error:
        if torch.cuda.device_count() > 1:
            raise
        pytest.skip(f"one device takes no two ranks: {error}")
    for number in range(50):
        rows = torch.full((1 + number % 5, 64), float(number), device="cuda")
        peer.send(rows)
        assert torch.equal(peer.receive(), rows + 1)
    peer.inlet.close()
    peer.outlet.close()
    peer.close()


@pytest.mark.gpu
def test_a_nccl_pair_whose_other_rank_never_comes_ends_at_its_deadline() -> None:
    from workers.links.nccl import NcclOutlet, new_name

    began = time.monotonic()
    with pytest.raises(LinkTimeout, match="did not connect within 2 s"):
        NcclOutlet(SLOTS, SLOT_BYTES, 0, new_name(), 2.0)
    assert time.monotonic() - began < 10


@pytest.mark.gpu
def test_nccl_sends_to_itself_in_one_group() -> None:
    from cupy.cuda import nccl

    rows = torch.arange(200, dtype=torch.uint8, device="cuda")
    got = torch.zeros_like(rows)
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    stream = torch.cuda.current_stream().cuda_stream
    nccl.groupStart()
    communicator.send(rows.data_ptr(), len(rows), nccl.NCCL_UINT8, 0, stream)
    communicator.recv(got.data_ptr(), len(got), nccl.NCCL_UINT8, 0, stream)
    nccl.groupEnd()
    torch.cuda.synchronize()
    assert torch.equal(rows, got)
