"""HTTP as ASGI gives it: bodies in, JSON and event streams out, errors in OpenAI's shape, and work
that ends when its client leaves."""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineError
from engine.http.replies import ErrorDetail, ErrorReply

encode = msgspec.json.Encoder().encode

Write = Callable[[bytes], Awaitable[None]]
_T = TypeVar("_T")
# Status, type and code for each reason of an EngineError.
_ERRORS: dict[str, tuple[int, str, str | None]] = {
    "invalid": (400, "invalid_request_error", None),
    "too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "unauthorized": (401, "invalid_request_error", "invalid_api_key"),
    "not_found": (404, "invalid_request_error", "model_not_found"),
    "too_large": (413, "invalid_request_error", "request_too_large"),
    "failed": (500, "server_error", "engine_failed"),
    "overloaded": (503, "server_error", "overloaded"),
    "unreachable": (503, "server_error", "engine_unreachable"),
    "timeout": (504, "server_error", "deadline_exceeded"),
}
_RETRY_AFTER_S = 1.0
_REQUEST_ID = b"x-request-id"
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class TooLarge(EngineError):
    """The body has more bytes than the server takes."""

    reason = "too_large"


class ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


def reply(body: object, status: int = 200) -> Response:
    """A struct or plain value as JSON."""
    return Response(encode(body), status, media_type="application/json")


def refusal(error: EngineError) -> Response:
    """The response for an error."""
    status, _, _ = _ERRORS[error.reason]
    response = Response(encode(_error_body(error)), status, media_type="application/json")
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        wait_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        response.headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return response


def http_refusal(status: int, message: str, code: str) -> Response:
    """The response for a fault of HTTP itself, such as an unknown path."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return reply(ErrorReply(ErrorDetail(message, kind, None, code)), status)


def bearer(request: Request) -> str:
    """The key in `Authorization: Bearer KEY`; empty without one."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The whole body. Raises TooLarge, ClientGone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > most_bytes:
            raise TooLarge(f"The body has more than {most_bytes} bytes: send less at once.")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client leaves (ClientGone)."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_outcome(work))
        watch = group.create_task(_cancel_when_gone(receive, task))
        await asyncio.wait([task])
        watch.cancel()
    if task.cancelled():
        raise ClientGone
    result = task.result()
    if isinstance(result, EngineError):
        raise result
    return result


async def together(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results in order; the first EngineError cancels the rest."""
    failures: list[EngineError] = []
    tasks: list[asyncio.Task[_T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(work) for work in works]
    except* EngineError as errors:
        failures += [error for error in errors.exceptions if isinstance(error, EngineError)]
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]


class EventStream(Response):
    """Server-sent events.

    `produce` gets the function that writes bytes to the client. An error before the first event is
    an ordinary error response; a later one is the last event.
    """

    def __init__(self, produce: Callable[[Write], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._produce = produce
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run `produce` for as long as the client listens."""

        async def write(data: bytes) -> None:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await while_connected(receive, self._produce(write))
        except EngineError as error:
            if not self._has_begun:
                await refusal(error)(scope, receive, send)
                return
            await write(event(_error_body(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class RequestIds:
    """Middleware: every response repeats its request's X-Request-Id, or has a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on and add the header."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_REQUEST_ID, b"")
        header = (_REQUEST_ID, given or secrets.token_hex(16).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self._app(scope, receive, send_with_id)


def event(data: object) -> bytes:
    """A struct as one server-sent event."""
    return b"data: " + encode(data) + b"\n\n"


def _error_body(error: EngineError) -> ErrorReply:
    _, kind, code = _ERRORS[error.reason]
    return ErrorReply(ErrorDetail(error.message, kind, error.param, code))


async def _outcome(work: Coroutine[Any, Any, _T]) -> _T | EngineError:
    try:
        return await work
    except EngineError as error:
        return error


async def _cancel_when_gone(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
