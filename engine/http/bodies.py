"""The OpenAI-compatible HTTP bodies: what comes in. Fields, defaults and extra fields are vLLM's.

Fields that are not named here are ignored, as vLLM does; fields that would change the answer and
that this version cannot honour are named in `_REFUSED` and refused.
"""

import secrets
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from engine import api
from engine.errors import InvalidRequest

Count = Annotated[int, Meta(ge=0)]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
_Body = TypeVar("_Body")

_TUPLES = {"stop", "stop_token_ids", "allowed_token_ids"}
# Deeper nesting than any client sends; the engine's decoder has a limit of its own.
_MOST_LEVELS = 32


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries beside the answer."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat completions share."""

    model: str
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Token] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[Token] | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = None
    deadline_s: Annotated[float, Meta(gt=0)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    n: Choices | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False
    user: str | None = None
    cache_salt: str | None = None
    structured_outputs: Any = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = False


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[Token]]
    echo: bool | None = False
    logprobs: Count | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatRequest(_Request, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template: str | None = None
    echo: bool | None = False
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: Any = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: a prompt or chat messages."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    model: str
    tokens: list[Token]


# Field -> whether a value asks for what is not there, and the words for it.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "suffix": (bool, "insertion (suffix)"),
    "best_of": (lambda value: value is not None and value != 1, "best_of"),
    "use_beam_search": (bool, "beam search"),
    "bad_words": (bool, "bad_words"),
    "truncate_prompt_tokens": (lambda value: value is not None, "truncate_prompt_tokens"),
    "structured_outputs": (bool, "structured output"),
    "tools": (bool, "tool calling (tools)"),
    "functions": (bool, "function calling (functions)"),
    "tool_choice": (lambda value: value not in (None, "none", "auto"), "tool_choice"),
    "response_format": (
        lambda value: value is not None and value != {"type": "text"},
        "response_format other than text",
    ),
    "continue_final_message": (bool, "continue_final_message"),
    "chat_template": (bool, "a chat_template of the request's own"),
}


def check(request: CompletionRequest | ChatRequest) -> None:
    """Raise InvalidRequest if the request asks for what this version does not have."""
    for name, (is_asked, words) in _REFUSED.items():
        if is_asked(getattr(request, name, None)):
            raise InvalidRequest(f"This version has no {words}: leave {name} out.", name)
    if isinstance(request, ChatRequest):
        if request.echo:
            raise InvalidRequest("This version has no echo in chats: leave echo out.", "echo")
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
        for name in ("messages", "chat_template_kwargs"):
            if _is_deep(getattr(request, name), _MOST_LEVELS):
                raise InvalidRequest(f"{name} is nested too deeply.", name)


def sampling(request: CompletionRequest | ChatRequest, **changes: object) -> api.Sampling:
    """The request's sampling fields; what is null or absent has the engine's default."""
    fields: dict[str, Any] = {}
    for name in api.Sampling.__struct_fields__:
        value = changes[name] if name in changes else getattr(request, name, None)
        if value is not None:
            fields[name] = value
    if isinstance(request.stop, str):
        fields["stop"] = (request.stop,)
    for name in _TUPLES & fields.keys():
        fields[name] = tuple(fields[name])
    return api.Sampling(**fields)


def variations(submit: api.Submit, count: int) -> list[api.Submit]:
    """`count` times the same; where a seed is given each has its own, so that they differ."""
    seed = submit.sampling.seed
    if seed is None or count == 1:
        return [submit] * count
    samplings = (
        msgspec.structs.replace(submit.sampling, seed=_wrapped(seed + number))
        for number in range(count)
    )
    return [msgspec.structs.replace(submit, sampling=sampling) for sampling in samplings]


def new_id(prefix: str) -> str:
    """A fresh id such as cmpl-0123abcd."""
    return f"{prefix}-{secrets.token_hex(16)}"


def decode(decoder: msgspec.json.Decoder[_Body], body: bytes) -> _Body:
    """The body as the decoder's type; InvalidRequest names the field that is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        # The place reads `$.stop[0]`, or `key` in `$.logit_bias`.
        field = place.rpartition("$")[2].strip(".`") or _missing(problem)
        where = f"{field}: " if field else ""
        raise InvalidRequest(f"{where}{problem}.", field) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None


def _missing(problem: str) -> str | None:
    """The field in "Object missing required field `model`"."""
    return problem.split("`")[1] if problem.startswith("Object missing") else None


def _wrapped(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _is_deep(value: object, levels: int) -> bool:
    if levels == 0:
        return True
    if isinstance(value, dict):
        items = cast(dict[str, object], value).values()
        return any(_is_deep(item, levels - 1) for item in items)
    if isinstance(value, list):
        return any(_is_deep(item, levels - 1) for item in cast(list[object], value))
    return False
