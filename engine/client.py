"""Python clients of an engine: `AsyncClient` and the blocking `Client`; pyzmq and msgspec suffice.

    async with AsyncClient() as client:
        async for chunk in client.stream("model", "Once upon a time", max_tokens=32):
            print(chunk.text, end="")

Leaving a stream early, or cancelling its task, ends the answer at the engine. Failures are the
`EngineError`s of `engine.errors`. A client belongs to one thread (or one event loop).
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator
from typing import Any, Self, TypeVar, Unpack

import zmq

from engine import api
from engine.answers import Answer, Chunk, Completion, whole
from engine.connection import Asked, Connection
from engine.errors import EngineError, EngineFailed
from engine.options import Messages, Options, Prompt, chat_request, prompt_request

ENDPOINT = "tcp://127.0.0.1:5570"
TIMEOUT_S = 10.0

_Reply = TypeVar("_Reply", bound=api.Reply)


class AsyncClient:
    """A client for asyncio (uvloop too). Use it with `async with`.

    `timeout_s` bounds the wait for an engine to be there and for every reply but answers, which
    take as long as they take (`deadline_s` bounds one).
    """

    def __init__(
        self, endpoint: str = ENDPOINT, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._line = Connection(endpoint, api_key)
        self._timeout_s = timeout_s
        self._connected = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Listen to the engine on this event loop."""
        loop = asyncio.get_running_loop()
        for socket in self._line.wakeups:
            loop.add_reader(socket.FD, self._pump)
        self._pump()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close; what still runs fails."""
        loop = asyncio.get_running_loop()
        for socket in self._line.wakeups:
            loop.remove_reader(socket.FD)
        self._line.close()

    def stream(
        self, model: str, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk]:
        """Continue a text, or token ids, piece by piece."""
        return self.submit(prompt_request(model, prompt, options))

    def stream_chat(
        self, model: str, messages: Messages, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk]:
        """Answer chat messages piece by piece."""
        return self.submit(chat_request(model, messages, options))

    async def complete(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a text, or token ids."""
        return whole([chunk async for chunk in self.stream(model, prompt, **options)])

    async def chat(self, model: str, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer chat messages."""
        return whole([chunk async for chunk in self.stream_chat(model, messages, **options)])

    async def submit(self, request: api.Submit) -> AsyncGenerator[Chunk]:
        """The answer to a request; the client gives it its id."""
        replies: asyncio.Queue[api.Reply | EngineError] = asyncio.Queue()
        await self._connect()
        number = self._send(request, replies)
        answer = Answer()
        try:
            while not answer.ended:
                chunk = answer.take(_good(await replies.get()))
                if chunk is not None:
                    yield chunk
        finally:
            self._line.release(number)
            self._pump_soon()

    async def models(self, api_key: str = "") -> list[api.Model]:
        """The variants that are served."""
        return (await self.ask(api.ListModels(0, api_key), api.Models)).models

    async def status(self, api_key: str = "") -> dict[str, Any]:
        """The state of the engine, its workers and blocks."""
        return (await self.ask(api.GetStatus(0, api_key), api.StatusReply)).status

    async def metrics(self) -> str:
        """Metrics as Prometheus text."""
        return (await self.ask(api.GetMetrics(0), api.MetricsReply)).text

    async def tokenize(self, model: str, prompt: str) -> list[int]:
        """Token ids of a text, as a request for `model` would get them."""
        return (await self.ask(api.Tokenize(0, model, prompt), api.Tokenized)).tokens

    async def detokenize(self, model: str, tokens: list[int]) -> str:
        """Text of token ids."""
        return (await self.ask(api.Detokenize(0, model, tokens), api.Detokenized)).text

    async def ask(self, request: Asked, kind: type[_Reply]) -> _Reply:
        """The one reply to a request; the client gives it its id."""
        replies: asyncio.Queue[api.Reply | EngineError] = asyncio.Queue()
        await self._connect()
        number = self._send(request, replies)
        try:
            async with asyncio.timeout(self._timeout_s):
                return _of_kind(await replies.get(), kind)
        except TimeoutError:
            raise self._line.silence(self._timeout_s) from None
        finally:
            self._line.release(number)
            self._pump_soon()

    async def _connect(self) -> None:
        if self._line.is_connected:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise self._line.silence(self._timeout_s) from None

    def _send(
        self, request: api.Submit | Asked, replies: asyncio.Queue[api.Reply | EngineError]
    ) -> int:
        try:
            return self._line.send(request, replies.put_nowait)
        finally:
            self._pump_soon()

    def _pump_soon(self) -> None:
        """Sending may swallow the socket's signal that something has come, so look again."""
        asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._line.pump()
        if self._line.is_connected:
            self._connected.set()
        else:
            self._connected.clear()


class Client:
    """The same, blocking, for one thread. Use it with `with`."""

    def __init__(
        self, endpoint: str = ENDPOINT, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._line = Connection(endpoint, api_key)
        self._timeout_s = timeout_s
        self._poller = zmq.Poller()
        for socket in self._line.wakeups:
            self._poller.register(socket, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close; what still runs fails."""
        self._line.close()

    def stream(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk]:
        """Continue a text, or token ids, piece by piece."""
        return self.submit(prompt_request(model, prompt, options))

    def stream_chat(
        self, model: str, messages: Messages, **options: Unpack[Options]
    ) -> Generator[Chunk]:
        """Answer chat messages piece by piece."""
        return self.submit(chat_request(model, messages, options))

    def complete(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a text, or token ids."""
        return whole(self.stream(model, prompt, **options))

    def chat(self, model: str, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer chat messages."""
        return whole(self.stream_chat(model, messages, **options))

    def submit(self, request: api.Submit) -> Generator[Chunk]:
        """The answer to a request; the client gives it its id."""
        replies: deque[api.Reply | EngineError] = deque()
        self._connect()
        number = self._line.send(request, replies.append)
        answer = Answer()
        try:
            while not answer.ended:
                while not replies:
                    self._wait()
                chunk = answer.take(_good(replies.popleft()))
                if chunk is not None:
                    yield chunk
        finally:
            self._line.release(number)

    def models(self) -> list[api.Model]:
        """The variants that are served."""
        return self.ask(api.ListModels(0), api.Models).models

    def status(self) -> dict[str, Any]:
        """The state of the engine, its workers and blocks."""
        return self.ask(api.GetStatus(0), api.StatusReply).status

    def metrics(self) -> str:
        """Metrics as Prometheus text."""
        return self.ask(api.GetMetrics(0), api.MetricsReply).text

    def tokenize(self, model: str, prompt: str) -> list[int]:
        """Token ids of a text, as a request for `model` would get them."""
        return self.ask(api.Tokenize(0, model, prompt), api.Tokenized).tokens

    def detokenize(self, model: str, tokens: list[int]) -> str:
        """Text of token ids."""
        return self.ask(api.Detokenize(0, model, tokens), api.Detokenized).text

    def ask(self, request: Asked, kind: type[_Reply]) -> _Reply:
        """The one reply to a request; the client gives it its id."""
        replies: deque[api.Reply | EngineError] = deque()
        self._connect()
        number = self._line.send(request, replies.append)
        try:
            deadline = time.monotonic() + self._timeout_s
            while not replies:
                self._wait(deadline)
            return _of_kind(replies.popleft(), kind)
        finally:
            self._line.release(number)

    def _connect(self) -> None:
        self._line.pump()
        deadline = time.monotonic() + self._timeout_s
        while not self._line.is_connected:
            self._wait(deadline)

    def _wait(self, deadline: float | None = None) -> None:
        """Until something happens on the line; past the deadline (monotonic) it is silent."""
        left_ms = None
        if deadline is not None:
            left_ms = max(0, math.ceil((deadline - time.monotonic()) * 1000))
        if not self._poller.poll(left_ms):
            raise self._line.silence(self._timeout_s)
        self._line.pump()


def _good(reply: api.Reply | EngineError) -> api.Reply:
    if isinstance(reply, EngineError):
        raise reply
    return reply


def _of_kind(reply: api.Reply | EngineError, kind: type[_Reply]) -> _Reply:
    reply = _good(reply)
    if not isinstance(reply, kind):
        raise EngineFailed(f"The engine answered with {type(reply).__name__} out of turn.")
    return reply
