"""How engines are asked over HTTP and what their streams say: ours and vLLM speak OpenAI's
completions, llama.cpp's server has a way of its own.

A dialect makes the body of a request and reads the events of its answer; it is pure.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from bench.piece import Piece
from engine.answers import Usage


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests for a variant go: servers that take turns, and what the variant is called
    there. `adapters` are llama.cpp's, by number, with the scale of each."""

    urls: tuple[str, ...]
    dialect: str = "openai"
    model: str = ""
    adapters: dict[int, float] = {}


class Reading(Protocol):
    """Reads the events of one answer."""

    def take(self, event: bytes) -> Piece | None:
        """What an event adds; None for nothing."""
        ...

    def last(self) -> Piece:
        """The end, once the stream has ended."""
        ...


class Dialect(msgspec.Struct, frozen=True):
    """The path that is posted to, the body of a request, and how to read the answer."""

    path: str
    body: Callable[[Route, Sequence[int], int], bytes]
    reading: Callable[[], Reading]


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


class _Step(msgspec.Struct):
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    stop_type: str = ""


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_step = msgspec.json.Decoder(_Step).decode


def _ask_openai(route: Route, prompt: Sequence[int], max_tokens: int) -> bytes:
    return msgspec.json.encode(
        {
            "model": route.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
    )


class _OpenAi:
    """Tokens come in choices, the counts in an event of their own at the end."""

    def __init__(self) -> None:
        self._index = 0
        self._reason = ""
        self._usage: Usage | None = None

    def take(self, event: bytes) -> Piece | None:
        """See `Reading`."""
        said = _decode_event(event)
        if said.usage is not None:
            self._usage = _counts(said.usage)
        for choice in said.choices:
            self._reason = choice.finish_reason or self._reason
            if choice.token_ids:
                index = self._index
                self._index += len(choice.token_ids)
                return Piece(choice.token_ids, index)
        return None

    def last(self) -> Piece:
        """See `Reading`."""
        return Piece((), self._index, self._reason or "none", self._usage)


def _ask_llama_cpp(route: Route, prompt: Sequence[int], max_tokens: int) -> bytes:
    body: dict[str, object] = {
        "prompt": prompt,
        "n_predict": max_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": True,
    }
    if route.adapters:
        body["lora"] = [{"id": number, "scale": one} for number, one in route.adapters.items()]
    return msgspec.json.encode(body)


class _LlamaCpp:
    """Every event counts the tokens so far. One that ends inside a character is not sent until the
    character is whole, so an event may bring several."""

    def __init__(self) -> None:
        self._index = 0
        self._prompt = 0
        self._stop = ""

    def take(self, event: bytes) -> Piece | None:
        """See `Reading`."""
        step = _decode_step(event)
        new = step.tokens_predicted - self._index
        self._prompt = step.tokens_evaluated
        self._stop = step.stop_type or self._stop
        if new <= 0:
            return None
        index = self._index
        self._index += new
        # Only how many there are matters to a load.
        return Piece(range(new), index)

    def last(self) -> Piece:
        """See `Reading`."""
        reason = "length" if self._stop == "limit" else self._stop or "none"
        return Piece((), self._index, reason, Usage(self._prompt, self._index, 0))


def _counts(told: _Usage) -> Usage:
    details = told.prompt_tokens_details
    cached = (details.cached_tokens if details else 0) or 0
    return Usage(told.prompt_tokens, told.completion_tokens, cached)


DIALECTS = {
    "openai": Dialect("/v1/completions", _ask_openai, _OpenAi),
    "llama.cpp": Dialect("/completion", _ask_llama_cpp, _LlamaCpp),
}
