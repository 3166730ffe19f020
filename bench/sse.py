"""Server-sent events over HTTP connections that are kept alive, for many requests at once.

Written upon asyncio alone, because the load shares the machine with what it measures.
"""

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

from engine.errors import EngineFailed

_Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_DATA = b"data: {"


class Connections:
    """Connections to one HTTP server."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._idle: list[_Line] = []

    async def events(self, path: str, body: bytes) -> AsyncGenerator[bytes]:
        """Post `body` and yield the JSON objects that are streamed back. Closing the generator
        early closes the connection: that is how HTTP cancels."""
        line = self._idle.pop() if self._idle else await self._connect()
        whole = False
        try:
            line[1].write(self._head(path, len(body)) + body)
            await line[1].drain()
            await _read_head(line[0])
            async for event in _read_events(line[0]):
                yield event
            whole = True
        finally:
            if whole:
                self._idle.append(line)
            else:
                line[1].close()

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()

    async def _connect(self) -> _Line:
        return await asyncio.open_connection(self._host, self._port, limit=1 << 20)

    def _head(self, path: str, length: int) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        return head.encode()


async def _read_head(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.split(b" ", 2)[1]
    if status != b"200":
        raise EngineFailed(f"the HTTP server answered {status.decode()}")
    if b"transfer-encoding: chunked" not in head.lower():
        raise EngineFailed("the HTTP server did not stream its answer")


async def _read_events(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """The events of an answer up to its end, wherever the HTTP chunks are cut."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            text = event.strip()
            if text.startswith(_DATA):
                yield text[len(_DATA) - 1 :]
    await reader.readexactly(2)
