"""The load generator against an engine and an HTTP server that answer without a model."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing

import msgspec

from bench.dialects import Route
from bench.doors import RoutedDoor
from bench.job import Ask, Job, asks
from bench.load import Tally, closed_loop, open_loop
from bench.piece import Piece
from engine.answers import Usage
from engine.errors import Overloaded

USAGE = b'{"prompt_tokens":4,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}'


def on_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """The test, run on an event loop of its own."""
    return lambda: asyncio.run(test())


class Counting:
    """A door that answers with 0, 1, 2, ..; it notes how many answers run at once."""

    def __init__(self, pause_s: float = 0.0, lost: int = 0) -> None:
        self._pause_s = pause_s
        self._lost = lost
        self.running = self.most = 0

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for index in range(ask.max_tokens - self._lost):
                await asyncio.sleep(self._pause_s)
                yield Piece([index], index)
            usage = Usage(len(ask.prompt), ask.max_tokens)
            yield Piece([], ask.max_tokens - self._lost, "length", usage)
        finally:
            self.running -= 1


class Stalling(Counting):
    """A door that gives one token and no more."""

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        self.running += 1
        try:
            yield Piece([0], 0)
            await asyncio.Event().wait()
        finally:
            self.running -= 1


class Refusing:
    """A door that is shut."""

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        raise Overloaded("try again later")
        yield


def questions(count: int, **changes: object) -> Sequence[Ask]:
    job = Job(endpoint="", models=("a", "b"), requests=count, prompt_tokens=(8, 32), vocabulary=999)
    return asks(msgspec.structs.replace(job, output_tokens=(3, 3), **changes))


def test_equal_seeds_give_equal_requests_and_models_take_turns():
    assert questions(5, seed=4) == questions(5, seed=4) != questions(5, seed=5)
    assert [ask.model for ask in questions(3)] == ["a", "b", "a"]
    assert all(8 <= len(ask.prompt) <= 32 for ask in questions(20))


@on_a_loop
async def test_a_closed_loop_keeps_its_streams_busy_and_counts_every_token():
    door, tally = Counting(), Tally()
    await closed_loop(questions(10), [door], tally, streams=4)
    assert tally.finished == {"length": 10}
    assert (tally.sums["output"], tally.sums["told"], tally.sums["mismatched"]) == (30, 30, 0)
    assert (len(tally.ttft), len(tally.itl), len(tally.e2e)) == (10, 20, 10)
    assert (door.most, door.running) == (4, 0)


@on_a_loop
async def test_gaps_count_once_a_load_has_settled():
    for settling_s, gaps in ((0.0, 4), (60.0, 0)):
        tally = Tally(settling_s)
        await closed_loop(questions(2), [Counting()], tally, streams=1)
        assert (len(tally.ttft), len(tally.itl), tally.sums["output"]) == (2, gaps, 6)


@on_a_loop
async def test_tokens_that_do_not_arrive_are_noticed():
    tally = Tally()
    await closed_loop(questions(2), [Counting(lost=1)], tally, streams=1)
    assert tally.sums["mismatched"] == 2


@on_a_loop
async def test_clients_that_leave_close_their_answers():
    door, tally = Stalling(), Tally()
    leaving = [msgspec.structs.replace(ask, leave_after_s=0.05) for ask in questions(3)]
    await closed_loop(leaving, [door], tally, streams=3)
    assert (tally.sums["left"], tally.sums["left_tokens"], door.running) == (3, 3, 0)
    assert not tally.finished


@on_a_loop
async def test_refusals_are_counted_by_kind():
    tally = Tally()
    await closed_loop(questions(3), [Refusing()], tally, streams=1)
    assert tally.refused == {"Overloaded": 3}
    assert tally.errors == ["try again later"] * 3


@on_a_loop
async def test_an_open_loop_does_not_wait_for_answers():
    door, tally = Counting(pause_s=0.05), Tally()
    todo = [msgspec.structs.replace(ask, at_s=0.01 * i) for i, ask in enumerate(questions(5))]
    await open_loop(todo, [door], tally)
    assert door.most == 5
    assert len(tally.lag) == 5
    assert tally.finished == {"length": 5}


@on_a_loop
async def test_http_answers_are_read_event_by_event_and_connections_kept():
    connections = 0
    events = [
        b'data: {"choices":[{"text":"x","token_ids":[7]}],"usage":null}\n\n',
        b'data: {"choices":[{"text":"y","token_ids":[8,9],"finish_reason":"length"}]}\n\n',
        b'data: {"choices":[],"usage":' + USAGE + b"}\n\ndata: [DONE]\n\n",
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = msgspec.json.decode(await reader.readexactly(length))
            assert (body["model"], body["prompt"], body["stream"]) == ("a", [1, 2, 3, 4], True)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in events:
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        door = RoutedDoor({"a": Route(urls=(url,), model="a")})
        for _ in range(2):
            async with aclosing(door.pieces(Ask("a", [1, 2, 3, 4], 3))) as answer:
                pieces = [piece async for piece in answer]
            assert pieces == [
                Piece([7], 0),
                Piece([8, 9], 1),
                Piece((), 3, "length", Usage(4, 3, 2)),
            ]
        door.close()
    assert connections == 1
