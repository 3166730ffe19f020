"""A ROUTER socket on the event loop: bounded, and aware of peers that vanish.

The clients' gateway and the fleet of workers each own one. Reading is driven by the socket's own
file descriptor and sending never waits, so that a message costs no future and no task switch. That
descriptor is edge-triggered: after each send or burst of reads the socket is looked at once more.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

log = logging.getLogger(__name__)

BURST = 256
HEARTBEAT_MS = 5_000
SILENCE_MS = 20_000

# Plain integers: putting flags together costs as much as sending.
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)

Sent = Literal["sent", "gone", "full"]


class Router:
    """One bound ROUTER. `on_message(peer, frames)` and `on_gone(peer)` are called on the loop."""

    def __init__(self, *, high_water: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # An unroutable message must be an error: it is how a vanished peer's requests are freed.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(high_water)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        # A half-open TCP connection shows itself only through missing heartbeats.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._peers: dict[int, bytes] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False

    def bind(self, endpoint: str) -> str:
        """Bind and return the address in force (port 0 becomes a real one). Raises zmq.ZMQError."""
        port = endpoint.rpartition(":")[2]
        self._socket.bind(endpoint[: -len(port)] + "*" if port == "0" else endpoint)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def start(
        self, on_message: Callable[[bytes, list[bytes]], None], on_gone: Callable[[bytes], None]
    ) -> None:
        """Begin to read on the running loop."""
        self._on_message = on_message
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self._loop.add_reader(self._monitor.FD, self._read_monitor)
        self._read_monitor()
        self._look_again()

    def send(self, peer: bytes, *frames: bytes) -> Sent:
        """Send at once or not at all: "gone" and "full" mean that nothing was sent."""
        try:
            # Only the first frame can fail: it is the one that looks for the peer and for room.
            self._socket.send(peer, _MORE)
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], _LAST)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "gone"
        finally:
            self._look_again()
        return "sent"

    def close(self) -> None:
        """Stop reading and close; what has been sent but not delivered is given a short while."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.FD)
            self._loop.remove_reader(self._monitor.FD)
            self._loop = None
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=500)
        self._context.term()

    def _look_again(self) -> None:
        if self._loop is not None and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._is_scheduled = False
        if self._loop is None:
            return
        for _ in range(BURST):
            # Asking costs half of what an exception does.
            if not int(self._socket.getsockopt(_EVENTS)) & _READABLE:
                return
            parts = self._socket.recv_multipart(_LAST, copy=False)
            peer, *frames = [part.bytes for part in parts]
            self._remember(parts[0].get(zmq.SRCFD), peer)
            try:
                self._on_message(peer, frames)
            except Exception:
                log.exception("a message could not be handled")
        self._look_again()

    def _remember(self, descriptor: object, peer: bytes) -> None:
        """Note which connection a peer speaks through. A descriptor that changes hands was closed
        in between, so the event that says so is waiting or already lost. A message that is read
        after its sender hung up leaves an entry until the descriptor is used again."""
        if not isinstance(descriptor, int) or self._peers.get(descriptor) == peer:
            return
        if descriptor in self._peers:
            self._read_monitor()
            if (former := self._peers.pop(descriptor, None)) is not None:
                self._lose(former)
        self._peers[descriptor] = peer

    def _read_monitor(self) -> None:
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            peer = self._peers.pop(int(event["value"]), None)
            if peer is not None:
                self._lose(peer)

    def _lose(self, peer: bytes) -> None:
        try:
            self._on_gone(peer)
        except Exception:
            log.exception("the loss of a peer could not be handled")
