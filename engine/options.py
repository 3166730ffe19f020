"""Requests to the engine from a client's arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

import msgspec

from engine import api
from engine.errors import InvalidRequest

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """What may be said about an answer: the fields of `api.Sampling`, whose defaults hold, and
    those of `api.Submit` that are not the question itself."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    skip_special_tokens: bool
    deadline_s: float | None
    priority: int
    template: Mapping[str, Any]
    add_special_tokens: bool


_SAMPLING = get_type_hints(api.Sampling)
_SUBMIT = {
    name: hint
    for name, hint in get_type_hints(api.Submit).items()
    if name in Options.__optional_keys__
}


def prompt_request(model: str, prompt: Prompt, options: Mapping[str, object]) -> api.Submit:
    """A Submit that continues a text or token ids."""
    question = prompt if isinstance(prompt, str) else list(prompt)
    return _submit(options, {"id": 0, "model": model, "prompt": question})


def chat_request(model: str, messages: Messages, options: Mapping[str, object]) -> api.Submit:
    """A Submit that answers chat messages."""
    question = [dict(message) for message in messages]
    return _submit(options, {"id": 0, "model": model, "messages": question})


def _submit(options: Mapping[str, object], fields: dict[str, Any]) -> api.Submit:
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name in _SAMPLING:
            sampling[name] = _checked(name, value, _SAMPLING[name])
        elif name in _SUBMIT:
            fields[name] = _checked(name, value, _SUBMIT[name])
        else:
            raise InvalidRequest(f"There is no option {name}.", name)
    return api.Submit(**fields, sampling=api.Sampling(**sampling))


def _checked(name: str, value: object, hint: object) -> object:
    """`value` as the type of the field, so that a wrong one is named before it is sent."""
    if name == "stop" and isinstance(value, str):
        value = (value,)
    try:
        return msgspec.convert(value, hint, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name}: {error}.", name) from None
