"""The OpenAPI document, made from the bodies themselves."""

from functools import cache
from typing import Any

import msgspec

from engine.http import bodies, replies

_REF = "#/components/schemas/{name}"
_TITLE = "BlockLLM"
# Path, method, summary, body, reply (None: not JSON).
_OPERATIONS: list[tuple[str, str, str, type | None, type | None]] = [
    (
        "/v1/completions",
        "post",
        "Continue a prompt",
        bodies.CompletionRequest,
        replies.CompletionReply,
    ),
    ("/v1/chat/completions", "post", "Answer a chat", bodies.ChatRequest, replies.ChatReply),
    ("/v1/models", "get", "List the models", None, replies.ModelList),
    ("/v1/models/{name}", "get", "Show a model", None, replies.ModelCard),
    ("/tokenize", "post", "Token ids of a text", bodies.TokenizeRequest, replies.TokenizeReply),
    (
        "/detokenize",
        "post",
        "Text of token ids",
        bodies.DetokenizeRequest,
        replies.DetokenizeReply,
    ),
    ("/health", "get", "Whether the engine has a worker", None, None),
    ("/ping", "get", "The same as /health", None, None),
    ("/ready", "get", "Whether new requests are taken", None, None),
    ("/status", "get", "State of the engine, its workers and blocks", None, dict[str, Any]),
    ("/metrics", "get", "Metrics for Prometheus", None, None),
    ("/version", "get", "The engine's version", None, dict[str, str]),
    ("/openapi.json", "get", "This document", None, dict[str, Any]),
    ("/", "get", "The dashboard", None, None),
]
_FAULTS = {
    "400": "A field is wrong",
    "401": "The key is missing or unknown",
    "404": "There is no such model",
    "413": "The body is too large",
    "500": "The engine's own fault",
    "503": "No worker, overloaded or draining: try again after Retry-After seconds",
    "504": "The deadline passed",
}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    types = [replies.ErrorReply]
    for *_, body, answer in _OPERATIONS:
        types += [kind for kind in (body, answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = {str(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for path, method, summary, body, answer in _OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": _responses(answer, schema_of),
            "security": [{"key": []}, {}],
        }
        if body is not None:
            operation["requestBody"] = {"required": True, "content": _json(schema_of[str(body)])}
        if "{" in path:
            operation["parameters"] = [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": "1"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _responses(answer: type | None, schema_of: dict[str, dict[str, Any]]) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "Done"}
    if answer is not None:
        done["content"] = _json(schema_of[str(answer)])
    if answer in (replies.CompletionReply, replies.ChatReply):
        done["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    fault = _json(schema_of[str(replies.ErrorReply)])
    faults = {code: {"description": words, "content": fault} for code, words in _FAULTS.items()}
    return {"200": done} | faults


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
