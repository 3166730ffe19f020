"""One client's line to an engine: socket, numbers of requests, liveness. It never waits: the two
clients in `engine.client` do, each in its own way."""

from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from engine import api
from engine.errors import (
    EngineError,
    EngineFailed,
    EngineUnreachable,
    InvalidRequest,
    rejection,
)

# The two ends of the same machine or network notice each other's death within the second of these.
_HEARTBEAT_MS = 2_000
_SILENCE_MS = 10_000
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 1_000
# Cancels of the last moment get so long to leave.
_LINGER_MS = 200
# Plain integers: putting flags together costs as much as asking.
_AT_ONCE, _EVENTS, _READABLE = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)

Asked = api.ListModels | api.GetStatus | api.GetMetrics | api.Tokenize | api.Detokenize
Taker = Callable[[api.Reply | EngineError], None]


class Connection:
    """Sends requests and hands each reply to the taker of its request.

    `wakeups` are the sockets that become readable when `pump` has something to do. A taker gets an
    EngineError as its last word where the request fails, too when the engine goes away.
    """

    def __init__(self, endpoint: str, api_key: str | None) -> None:
        self._endpoint = endpoint
        self._key = api_key or ""
        self._numbers = 0
        self._takers: dict[int, Taker] = {}
        self._connected = False
        self._context = zmq.Context[zmq.SyncSocket]()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self.wakeups = (self._socket, self._monitor)
        _configure(self._socket)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EngineUnreachable(
                f"{endpoint!r} is not an endpoint: write one such as tcp://127.0.0.1:5570."
            ) from error

    @property
    def is_connected(self) -> bool:
        """Whether an engine is at the other end now."""
        return self._connected

    def silence(self, seconds: float) -> EngineUnreachable:
        """The error for an engine that did not answer for so long."""
        return EngineUnreachable(
            f"No engine answers at {self._endpoint} for {seconds:g} s: start one with "
            "`python -m engine launch`, or give the endpoint that it prints."
        )

    def send(self, request: api.Submit | Asked, taker: Taker) -> int:
        """Send a request under a new number, which is returned for `release`."""
        self._numbers += 1
        number = self._numbers
        changes: dict[str, object] = {"id": number}
        if not isinstance(request, api.GetMetrics):
            changes["api_key"] = request.api_key or self._key
        body = _encoded(msgspec.structs.replace(request, **changes))
        try:
            self._socket.send_multipart([api.PROTOCOL, body], zmq.NOBLOCK)
        except zmq.Again:
            raise self._lost() from None
        self._takers[number] = taker
        return number

    def release(self, number: int) -> None:
        """The taker leaves: an answer that still runs is cancelled at once."""
        if self._takers.pop(number, None) is not None and self._connected:
            self._cancel(number)

    def pump(self) -> None:
        """Hand on everything that has arrived, in order."""
        if self._socket.closed:
            return
        self._receive()
        while _is_readable(self._monitor):
            event = self._monitor.recv_multipart(_AT_ONCE)
            self._connected = parse_monitor_message(event)["event"] != zmq.EVENT_DISCONNECTED
            if not self._connected:
                self._receive()
                self._fail_all(self._lost)

    def close(self) -> None:
        """Close the sockets; what still runs is cancelled and fails."""
        for number in self._takers if self._connected else ():
            self._cancel(number)
        self._connected = False
        self._fail_all(lambda: EngineUnreachable("The client was closed."))
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=_LINGER_MS)
        self._context.term()

    def _cancel(self, number: int) -> None:
        try:
            self._socket.send_multipart([api.PROTOCOL, api.encode(api.Cancel(number))], zmq.NOBLOCK)
        except zmq.Again:
            # The line broke just now, and with it every request of this connection.
            return

    def _receive(self) -> None:
        while _is_readable(self._socket):
            frames = self._socket.recv_multipart(_AT_ONCE)
            try:
                if frames[:1] != [api.PROTOCOL] or len(frames) != 2:
                    raise msgspec.DecodeError("its protocol is another one")
                self._hand_on(api.decode_reply(frames[1]))
            except msgspec.DecodeError as error:
                self._fail_all(_unreadable(error))

    def _hand_on(self, reply: api.Reply) -> None:
        goes_on = isinstance(reply, api.Accepted | api.Tokens)
        taker = self._takers.get(reply.id) if goes_on else self._takers.pop(reply.id, None)
        if taker is not None:
            taker(rejection(reply) if isinstance(reply, api.Rejected) else reply)

    def _fail_all(self, error: Callable[[], EngineError]) -> None:
        takers, self._takers = self._takers, {}
        for taker in takers.values():
            taker(error())

    def _lost(self) -> EngineUnreachable:
        return EngineUnreachable(f"The engine at {self._endpoint} went away: try again.")


def _configure(socket: zmq.SyncSocket) -> None:
    """Nothing queues for an engine that is not there; all that comes is read; death is noticed."""
    settings = {
        zmq.IMMEDIATE: 1,
        zmq.SNDHWM: 0,
        zmq.RCVHWM: 0,
        zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: _SILENCE_MS,
        zmq.RECONNECT_IVL: _RECONNECT_MS,
        zmq.RECONNECT_IVL_MAX: _RECONNECT_MAX_MS,
        zmq.CONNECT_TIMEOUT: _SILENCE_MS,
    }
    for option, value in settings.items():
        socket.setsockopt(option, value)


def _unreadable(error: msgspec.DecodeError) -> Callable[[], EngineFailed]:
    message = f"A reply cannot be read: {error}; use an engine of the client's version."
    return lambda: EngineFailed(message)


def _is_readable(socket: zmq.SyncSocket) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & _READABLE)


def _encoded(request: api.Request) -> bytes:
    try:
        body = api.encode(request)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidRequest(f"The request cannot be sent: {error}.") from None
    if len(body) > api.MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"The request has {len(body)} bytes; at most {api.MAX_REQUEST_BYTES} can be sent."
        )
    return body
