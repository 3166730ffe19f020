"""Two ways to the engine with one face: ZeroMQ through `engine.client`, and raw HTTP with
server-sent events over connections that are kept alive.

Called by the load process. The HTTP side is written upon asyncio alone, because the load shares the
machine with what it measures.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from bench.job import Ask
from engine.answers import Usage
from engine.client import AsyncClient
from engine.errors import EngineFailed


class Piece(msgspec.Struct, frozen=True):
    """Tokens as they came; the last piece of an answer has its reason and the engine's counts."""

    tokens: Sequence[int]
    index: int
    reason: str | None = None
    usage: Usage | None = None


class Door(Protocol):
    """How the load asks. Closing the generator leaves the answer."""

    def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The answer to `ask`."""
        ...


class ZmqDoor:
    """One connection over ZeroMQ."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        """See `Door`."""
        answer = self._client.stream(
            ask.model, ask.prompt, max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True
        )
        async with aclosing(answer):
            async for chunk in answer:
                yield Piece(chunk.token_ids, chunk.index, chunk.finish_reason, chunk.usage)


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] = []


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Event).decode


class HttpDoor:
    """Connections over HTTP, kept alive and used again."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        """See `Door`. An answer that is left closes its connection: that is how HTTP cancels."""
        line = self._idle.pop() if self._idle else await self._connect()
        whole = False
        try:
            line[1].write(self._request(ask))
            await line[1].drain()
            await _read_head(line[0])
            index, reason, last = 0, "", Piece((), 0, "none")
            async for event in _events(line[0]):
                for choice in event.choices:
                    reason = choice.finish_reason or reason
                    if choice.token_ids:
                        yield Piece(choice.token_ids, index)
                        index += len(choice.token_ids)
                if event.usage is not None:
                    last = Piece((), index, reason, _usage(event.usage))
            whole = True
            yield last
        finally:
            if whole:
                self._idle.append(line)
            else:
                line[1].close()

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, limit=1 << 20)

    def _request(self, ask: Ask) -> bytes:
        body = msgspec.json.encode(
            {
                "model": ask.model,
                "prompt": ask.prompt,
                "max_tokens": ask.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def _read_head(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.split(b" ", 2)[1]
    if status != b"200":
        raise EngineFailed(f"the HTTP server answered {status.decode()}")
    if b"transfer-encoding: chunked" not in head.lower():
        raise EngineFailed("the HTTP server did not stream its answer")


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[_Event]:
    """The events of an answer up to its end; the server cuts HTTP chunks only between events."""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        data = await reader.readexactly(size + 2)
        for line in data.split(b"\n\n"):
            text = line.strip()
            if text.startswith(b"data: {"):
                yield _decode(text.removeprefix(b"data: "))
    await reader.readexactly(2)


def _usage(told: _Usage) -> Usage:
    cached = told.prompt_tokens_details.cached_tokens if told.prompt_tokens_details else 0
    return Usage(told.prompt_tokens, told.completion_tokens, cached)
