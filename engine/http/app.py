"""The HTTP application: paths, and what each of them asks of the engine."""

import asyncio
from importlib.resources import files
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from engine import api
from engine.client import AsyncClient
from engine.errors import EngineError, EngineUnreachable, InvalidRequest, ModelNotFound
from engine.http import bodies
from engine.http.asgi import (
    ClientGone,
    EventStream,
    RequestIds,
    bearer,
    http_refusal,
    read_body,
    refusal,
    reply,
    while_connected,
)
from engine.http.chats import Chats
from engine.http.completions import Completions
from engine.http.openapi import document
from engine.http.replies import DetokenizeReply, ModelList, TokenizeReply, card

_Body = TypeVar("_Body")

_COMPLETION = msgspec.json.Decoder(bodies.CompletionRequest)
_CHAT = msgspec.json.Decoder(bodies.ChatRequest)
_TOKENIZE = msgspec.json.Decoder(bodies.TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(bodies.DetokenizeRequest)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
# A probe that waits longer says the same as one that fails.
_PROBE_S = 3.0
_NO_ANSWER_STATUS = 499


class Endpoints:
    """One method for each path."""

    def __init__(self, client: AsyncClient, max_body_bytes: int) -> None:
        self._client = client
        self._max_body_bytes = max_body_bytes

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._body(request, _COMPLETION)
        return await _answer(request, Completions(self._client, body, bearer(request)), body.stream)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(request, _CHAT)
        return await _answer(request, Chats(self._client, body, bearer(request)), body.stream)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        models = await self._client.models(bearer(request))
        return reply(ModelList(data=[card(model) for model in models]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        for model in await self._client.models(bearer(request)):
            if model.id == name:
                return reply(card(model))
        raise ModelNotFound(f"The model {name!r} does not exist.", "model")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await self._body(request, _TOKENIZE)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Give either prompt or messages, and not both.", "prompt")
        question = api.Tokenize(
            0, body.model, body.prompt, body.messages, body.add_special_tokens, bearer(request)
        )
        found = await self._client.ask(question, api.Tokenized)
        return reply(TokenizeReply(len(found.tokens), found.context, found.tokens))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = await self._body(request, _DETOKENIZE)
        question = api.Detokenize(0, body.model, body.tokens, bearer(request))
        return reply(DetokenizeReply((await self._client.ask(question, api.Detokenized)).text))

    async def health(self, _request: Request) -> Response:
        """GET /health: empty; 503 while the engine is away or has no worker."""
        state = await self._state()
        if state not in ("ready", "draining"):
            raise EngineUnreachable(
                f"The engine is {state} and has no worker: wait, or see its log."
            )
        return Response()

    async def ready(self, _request: Request) -> Response:
        """GET /ready: like /health, and 503 while the engine drains."""
        state = await self._state()
        if state != "ready":
            raise EngineUnreachable(f"The engine is {state}: wait, or use another one.")
        return Response()

    async def status(self, request: Request) -> Response:
        """GET /status: what the dashboard shows."""
        return reply(await self._client.status(bearer(request)))

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        return Response(await self._client.metrics(), media_type=_PROMETHEUS)

    async def version(self, _request: Request) -> Response:
        """GET /version: the engine's."""
        return reply({"version": (await self._client.status()).get("version", "")})

    async def openapi(self, _request: Request) -> Response:
        """GET /openapi.json."""
        return reply(document())

    async def dashboard(self, _request: Request) -> Response:
        """GET /: a page that shows /status."""
        return HTMLResponse(files("engine").joinpath("dashboard/index.html").read_bytes())

    async def _state(self) -> str:
        try:
            async with asyncio.timeout(_PROBE_S):
                return str((await self._client.status()).get("state", "unknown"))
        except TimeoutError:
            raise EngineUnreachable("The engine does not answer: see its log.") from None

    async def _body(self, request: Request, decoder: msgspec.json.Decoder[_Body]) -> _Body:
        return bodies.decode(decoder, await read_body(request, self._max_body_bytes))


def build(client: AsyncClient, max_body_bytes: int) -> Starlette:
    """The application; `client` is shared by all requests."""
    at = Endpoints(client, max_body_bytes)
    routes = [
        Route("/v1/completions", at.completions, methods=["POST"]),
        Route("/v1/chat/completions", at.chat_completions, methods=["POST"]),
        Route("/v1/models", at.models),
        Route("/v1/models/{name:path}", at.model),
        Route("/tokenize", at.tokenize, methods=["POST"]),
        Route("/detokenize", at.detokenize, methods=["POST"]),
        Route("/health", at.health),
        Route("/ping", at.health),
        Route("/ready", at.ready),
        Route("/status", at.status),
        Route("/metrics", at.metrics),
        Route("/version", at.version),
        Route("/openapi.json", at.openapi),
        Route("/", at.dashboard),
    ]
    handlers = {
        EngineError: _engine_error,
        ClientGone: _client_gone,
        HTTPException: _http_error,
        Exception: _own_fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)  # pyright: ignore[reportArgumentType]
    app.router.redirect_slashes = False
    app.add_middleware(RequestIds)
    return app


async def _answer(request: Request, answers: Completions | Chats, stream: bool | None) -> Response:
    if stream:
        return EventStream(answers.stream)
    return reply(await while_connected(request.receive, answers.whole()))


async def _engine_error(_request: Request, error: EngineError) -> Response:
    return refusal(error)


async def _client_gone(_request: Request, _error: ClientGone) -> Response:
    # Nobody reads it; it only ends the request.
    return Response(status_code=_NO_ANSWER_STATUS)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is no path {path}: see /openapi.json."
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}: see /openapi.json."
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    response = http_refusal(error.status_code, message, code)
    response.headers.update(error.headers or {})
    return response


async def _own_fault(_request: Request, _error: Exception) -> Response:
    message = "The HTTP server failed to handle this request; its log says why."
    return http_refusal(500, message, "internal_error")
