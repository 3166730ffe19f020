"""Ways to an engine with one face: ZeroMQ through `engine.client`, and HTTP with server-sent
events, to ours or to whatever a variant's route names.

Called by the load process.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from itertools import cycle
from typing import Protocol

from bench.dialects import DIALECTS, Route
from bench.job import Ask
from bench.piece import Piece
from bench.sse import Connections
from engine.client import AsyncClient


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


class RoutedDoor:
    """HTTP to the servers that a variant's route names, in turn."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        urls = {url for route in routes.values() for url in route.urls}
        self._servers = {url: Connections(url) for url in urls}
        # Variants with the same servers share their turn.
        turns = {route.urls: cycle(route.urls) for route in routes.values()}
        self._turns = {name: turns[route.urls] for name, route in routes.items()}

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        """See `Door`."""
        route = self._routes[ask.model]
        dialect = DIALECTS[route.dialect]
        reading = dialect.reading()
        body = dialect.body(route, ask.prompt, ask.max_tokens)
        server = self._servers[next(self._turns[ask.model])]
        async with aclosing(server.events(dialect.path, body)) as events:
            async for event in events:
                piece = reading.take(event)
                if piece is not None:
                    yield piece
        yield reading.last()

    def close(self) -> None:
        """Close what is idle."""
        for server in self._servers.values():
            server.close()
