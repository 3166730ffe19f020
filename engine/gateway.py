"""The clients' socket: frames become requests, replies become frames.

Whatever a client sends, it is answered or counted and nothing else happens. A client that vanished,
or that does not read, is reported once, so that what it asked for stops at once.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import zmq

from engine import api
from engine.config import ConfigError
from engine.router import Router

log = logging.getLogger(__name__)

# Replies that may wait for one client: minutes of a stream, seconds of the busiest HTTP process.
HIGH_WATER = 65_536
# Bodies between the two sizes are refused in words; larger ones end the connection.
MAX_FRAME_BYTES = 2 * api.MAX_REQUEST_BYTES
UNKNOWN_ID = -1

_ITEMS = msgspec.msgpack.Decoder(list[Any]).decode
_TAGS = {str(kind.__struct_config__.tag): kind for kind in get_args(api.Request)}


class Gateway:
    """A ROUTER that speaks `engine.api`. `counts`: requests, malformed, undelivered."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._router = Router(high_water=HIGH_WATER, max_bytes=MAX_FRAME_BYTES)
        self._lost: set[bytes] = set()

    def bind(self, endpoint: str) -> str:
        """Bind and return the address in force. Raises ConfigError if it cannot be had."""
        try:
            return self._router.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise ConfigError(
                    f"{endpoint} is in use, by another engine perhaps: stop it or choose another "
                    "address with --zmq"
                ) from error
            raise ConfigError(f"{endpoint} cannot be bound: {error.strerror}") from error

    def start(
        self,
        on_request: Callable[[bytes, api.Request], None],
        on_vanished: Callable[[bytes], None],
    ) -> None:
        """Begin to read on the running loop."""
        self._on_request = on_request
        self._on_vanished = on_vanished
        self._router.start(self._receive, self._on_vanished)

    def reply(self, client: bytes, reply: api.Reply) -> None:
        """Send a reply; a client that cannot be reached is reported as vanished, later."""
        if self._router.send(client, api.PROTOCOL, api.encode(reply)) == "sent":
            return
        self.counts["undelivered"] += 1
        if client not in self._lost:
            self._lost.add(client)
            asyncio.get_running_loop().call_soon(self._report, client)

    def close(self) -> None:
        """Close the socket."""
        self._router.close()

    def _report(self, client: bytes) -> None:
        self._lost.discard(client)
        self._on_vanished(client)

    def _receive(self, client: bytes, frames: list[bytes]) -> None:
        self.counts["requests"] += 1
        refusal = _misframed(frames)
        if refusal is None:
            try:
                request = api.decode_request(frames[1])
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                refusal = _undecoded(frames[1], error)
            else:
                self._hand_on(client, request)
                return
        self.counts["malformed"] += 1
        log.debug("a client sent a malformed request: %s", refusal.message)
        self.reply(client, refusal)

    def _hand_on(self, client: bytes, request: api.Request) -> None:
        try:
            self._on_request(client, request)
        except Exception:
            log.exception("request %d failed", request.id)
            message = "The engine failed to handle this request; its log says why."
            self.reply(client, api.Rejected(request.id, "failed", message))


def _misframed(frames: list[bytes]) -> api.Rejected | None:
    wanted = api.PROTOCOL.decode()
    if len(frames) != 2 or frames[0] != api.PROTOCOL:
        message = f"A message is two frames, {wanted} and a body; another one was sent."
        return api.Rejected(UNKNOWN_ID, "invalid", message)
    if len(frames[1]) > api.MAX_REQUEST_BYTES:
        message = f"A body has at most {api.MAX_REQUEST_BYTES} bytes, this one {len(frames[1])}."
        return api.Rejected(UNKNOWN_ID, "invalid", message)
    return None


def _undecoded(body: bytes, error: Exception) -> api.Rejected:
    """The refusal of a body, with its id and the wrong field as far as they can be made out."""
    try:
        tag, name = _head(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return api.Rejected(UNKNOWN_ID, "invalid", "The body is not MessagePack.")
    number = name if type(name) is int else UNKNOWN_ID
    kind = _TAGS.get(tag) if isinstance(tag, str) else None
    if kind is None:
        known = ", ".join(_TAGS)
        return api.Rejected(number, "invalid", f"The body names none of the messages {known}.")
    problem, _, path = str(error).partition(" - at `")
    field = _field(kind, path)
    where = f"{field}: " if field else ""
    return api.Rejected(number, "invalid", f"{where}{problem}.", param=field)


def _head(body: bytes) -> tuple[object, object]:
    """The first two items of a body, which are None where it has none."""
    try:
        items = _ITEMS(body)
    except msgspec.ValidationError:
        return None, None
    first, second, *_ = [*items, None, None]
    return first, second


def _field(kind: type[msgspec.Struct], path: str) -> str | None:
    """The field that a path such as `$[4][2]` leads to."""
    steps = path.removeprefix("$").rstrip("`").removeprefix("[").removesuffix("]").split("][")
    # The first item of the array is the tag.
    name = _nth(kind, int(steps[0]) - 1) if steps[0].isdigit() else None
    if name == "sampling" and len(steps) > 1 and steps[1].isdigit():
        return _nth(api.Sampling, int(steps[1]))
    return name


def _nth(kind: type[msgspec.Struct], index: int) -> str | None:
    fields = kind.__struct_fields__
    return fields[index] if 0 <= index < len(fields) else None
