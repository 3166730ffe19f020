"""The clients' socket, against clients that break every rule."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine import api
from engine.config import ConfigError
from engine.gateway import MAX_FRAME_BYTES, Gateway
from tests.engine import rig


@contextlib.asynccontextmanager
async def gateway(
    on_request: Callable[[Gateway, bytes, api.Request], None], endpoint: str = "tcp://127.0.0.1:0"
) -> AsyncIterator[tuple[Gateway, str, list[bytes]]]:
    """A gateway, its address, and the clients it reported as vanished."""
    made = Gateway()
    vanished: list[bytes] = []
    address = made.bind(endpoint)
    made.start(lambda client, request: on_request(made, client, request), vanished.append)
    try:
        yield made, address, vanished
    finally:
        made.close()


@contextlib.contextmanager
def dealer(address: str) -> "contextlib.AbstractContextManager[zmq.asyncio.Socket]":
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def answer(socket: zmq.asyncio.Socket) -> api.Reply:
    async with asyncio.timeout(10):
        frames = await socket.recv_multipart()
    assert frames[0] == api.PROTOCOL
    return api.decode_reply(frames[1])


def echo(made: Gateway, client: bytes, request: api.Request) -> None:
    made.reply(client, api.MetricsReply(request.id, "fine"))


METRICS = api.encode(api.GetMetrics(7))
SUBMIT = ["submit", 5, "base", "hi", None]
OVERLONG = [*SUBMIT, [], "", 0, {}, True, "one too many"]


@pytest.mark.parametrize(
    ("frames", "number", "param", "told"),
    [
        ([b""], -1, None, "two frames"),
        ([b"BLK1"], -1, None, "two frames"),
        ([b"BLK0", METRICS], -1, None, "two frames"),
        ([b"BLK1", METRICS, METRICS], -1, None, "two frames"),
        ([b"BLK1", b""], -1, None, "not MessagePack"),
        ([b"BLK1", b"\xc1"], -1, None, "not MessagePack"),
        ([b"BLK1", METRICS[:-1]], -1, None, "not MessagePack"),
        ([b"BLK1", b"\x91" * 100_000], -1, None, "not MessagePack"),
        ([b"BLK1", bytes(api.MAX_REQUEST_BYTES + 1)], -1, None, "at most"),
        ([b"BLK1", msgspec.msgpack.encode(["dance", 3])], 3, None, "none of the messages"),
        ([b"BLK1", msgspec.msgpack.encode({"id": 3})], -1, None, "none of the messages"),
        ([b"BLK1", msgspec.msgpack.encode(["metrics"])], -1, None, "length"),
        ([b"BLK1", msgspec.msgpack.encode(["metrics", "x"])], -1, "id", "Expected `int`"),
        ([b"BLK1", msgspec.msgpack.encode(["submit", 4, 5])], 4, "model", "Expected `str`"),
        ([b"BLK1", msgspec.msgpack.encode([*SUBMIT, ["a"]])], 5, "max_tokens", "Expected `int"),
        ([b"BLK1", msgspec.msgpack.encode([*SUBMIT, [None, 0, "hot"]])], 5, "temperature", "float"),
        ([b"BLK1", msgspec.msgpack.encode(OVERLONG)], 5, None, "length"),
    ],
)
def test_malformed_requests_are_answered_and_the_next_one_is_served(
    frames: list[bytes], number: int, param: str | None, told: str
) -> None:
    async def test() -> None:
        async with gateway(echo) as (made, address, _):
            with dealer(address) as socket:
                await socket.send_multipart(frames)
                reply = await answer(socket)
                assert isinstance(reply, api.Rejected)
                assert (reply.id, reply.reason) == (number, "invalid")
                assert told in reply.message
                if param is not None:
                    assert reply.param == param
                assert made.counts["malformed"] == 1
                await socket.send_multipart([api.PROTOCOL, METRICS])
                assert await answer(socket) == api.MetricsReply(7, "fine")

    rig.run(test())


def test_random_bytes_never_stop_the_service() -> None:
    async def test() -> None:
        dice = random.Random(1)
        whole = msgspec.msgpack.encode([*SUBMIT, [5, 0, 1.0], "", 0, {"a": [1]}, True])
        async with gateway(echo) as (made, address, _):
            with dealer(address) as socket:
                for _ in range(2000):
                    body = bytearray(whole)
                    for _ in range(dice.randint(1, 4)):
                        body[dice.randrange(len(body))] = dice.randrange(256)
                    await socket.send_multipart([api.PROTOCOL, bytes(body)])
                    await answer(socket)
                assert made.counts["requests"] == 2000
                assert made.counts["malformed"] > 100

    rig.run(test())


def test_absurdly_large_bodies_end_the_connection_and_nothing_else() -> None:
    async def test() -> None:
        async with gateway(echo) as (_, address, _), asyncio.timeout(30):
            with dealer(address) as rude, dealer(address) as polite:
                await rude.send_multipart([api.PROTOCOL, bytes(MAX_FRAME_BYTES + 1)])
                await polite.send_multipart([api.PROTOCOL, METRICS])
                assert await answer(polite) == api.MetricsReply(7, "fine")

    rig.run(test())


def test_a_fault_in_handling_is_told_to_the_client() -> None:
    def fail(_made: Gateway, _client: bytes, _request: api.Request) -> None:
        raise RuntimeError("a fault")

    async def test() -> None:
        async with gateway(fail) as (_, address, _):
            with dealer(address) as socket:
                for _ in range(2):
                    await socket.send_multipart([api.PROTOCOL, METRICS])
                    reply = await answer(socket)
                    assert isinstance(reply, api.Rejected)
                    assert (reply.id, reply.reason) == (7, "failed")

    rig.run(test())


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_client_that_leaves_is_reported_once(scheme: str, tmp_path: Path) -> None:
    async def test() -> None:
        endpoint = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
        async with gateway(echo, endpoint) as (_, address, vanished):
            with dealer(address) as stays:
                await stays.send_multipart([api.PROTOCOL, METRICS])
                await answer(stays)
                # One after the other, so that descriptors are used again.
                for number in range(1, 6):
                    with dealer(address) as leaves:
                        await leaves.send_multipart([api.PROTOCOL, METRICS])
                        await answer(leaves)
                    await rig.until(lambda number=number: len(vanished) == number)
                assert len(set(vanished)) == 5

    rig.run(test())


def test_an_undeliverable_reply_reports_the_client() -> None:
    async def test() -> None:
        async with gateway(echo) as (made, _, vanished):
            made.reply(b"nobody", api.MetricsReply(1, ""))
            made.reply(b"nobody", api.MetricsReply(2, ""))
            await rig.until(lambda: vanished == [b"nobody"])
            assert made.counts["undelivered"] == 2

    rig.run(test())


def test_a_client_that_does_not_read_is_given_up() -> None:
    async def test() -> None:
        async with gateway(echo) as (made, address, vanished):
            with dealer(address) as socket:
                socket.rcvhwm = 1
                clients: list[bytes] = []
                made._on_request = lambda client, _request: clients.append(client)
                await socket.send_multipart([api.PROTOCOL, METRICS])
                await rig.until(lambda: bool(clients))
                reply = api.MetricsReply(7, "x" * 10_000)
                for _ in range(100_000):
                    made.reply(clients[0], reply)
                    if made.counts["undelivered"]:
                        break
                await rig.until(lambda: vanished == clients)

    rig.run(test())


def test_an_address_in_use_is_named() -> None:
    first, second = Gateway(), Gateway()
    try:
        address = first.bind("tcp://127.0.0.1:0")
        with pytest.raises(ConfigError, match="is in use"):
            second.bind(address)
        with pytest.raises(ConfigError, match="cannot be bound"):
            second.bind("tcp://192.0.2.1:5570")
    finally:
        first.close()
        second.close()
