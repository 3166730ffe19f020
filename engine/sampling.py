"""Pure: are a request's sampling fields in range, and what do they mean to a worker?"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from engine import api
from engine.errors import InvalidRequest, PromptTooLong
from workers import wire

MAX_LOGPROBS = 20
MAX_STOPS = 16
INT64 = 1 << 63


def _within(low: float, high: float) -> Callable[[float], bool]:
    # Written so that NaN is outside.
    return lambda value: low <= value <= high


_AT_LEAST_0 = _within(0, math.inf)
_LOGPROBS = (_within(0, MAX_LOGPROBS), f"between 0 and {MAX_LOGPROBS}")
_PENALTY = (_within(-2, 2), "between -2 and 2")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_AT_LEAST_0, "at least 1"),
    "min_tokens": (_AT_LEAST_0, "at least 0"),
    "temperature": (lambda value: 0 <= value < math.inf, "a number of at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (_within(-1, INT64 - 1), "at least 1, or 0 or -1 for no limit"),
    "min_p": (_within(0, 1), "between 0 and 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (lambda value: 0 < value < math.inf, "above 0"),
    "seed": (_within(-INT64, INT64 - 1), "a 64-bit integer"),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "deadline_s": (lambda value: 0 < value < math.inf, "above 0"),
}


def check(sampling: api.Sampling, vocabulary: int) -> None:
    """Raise InvalidRequest, which names the field, unless all of `sampling` makes sense."""
    for name, (is_right, rule) in _RULES.items():
        value = getattr(sampling, name)
        if value is not None and not is_right(value):
            raise InvalidRequest(f"{name} must be {rule}, got {value}.", name)
    _check_lengths(sampling)
    _check_stops(sampling.stop)
    check_ids("stop_token_ids", sampling.stop_token_ids, vocabulary)
    check_ids("allowed_token_ids", sampling.allowed_token_ids or (), vocabulary)
    check_ids("logit_bias", sampling.logit_bias, vocabulary)
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise InvalidRequest("allowed_token_ids must name at least one token.", "allowed_token_ids")
    for token, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias must be between -100 and 100, got {bias} for token {token}.",
                "logit_bias",
            )


def check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    """Raise InvalidRequest unless all token ids are within the vocabulary."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"{name} has token id {token}: the model's ids are 0 to {vocabulary - 1}.", name
            )


def answer_budget(
    prompt_tokens: int, max_tokens: int | None, context: int, capacity: int | None
) -> int:
    """How long the answer may become. `context` is the model's longest sequence, `capacity` the
    longest that memory holds (None: not known yet). Raises PromptTooLong."""
    least = prompt_tokens + (1 if max_tokens is None else max_tokens)
    if least > context:
        asked = f"{prompt_tokens} in the prompt"
        if max_tokens is not None:
            asked = f"{least} tokens ({asked}, {max_tokens} for the answer)"
        raise PromptTooLong(
            f"This model's maximum context length is {context} tokens, however you requested "
            f"{asked}: shorten the prompt or the answer.",
            "max_tokens" if prompt_tokens < context else "prompt",
        )
    if capacity is not None and least > capacity:
        raise PromptTooLong(
            f"The memory for this model holds {capacity} tokens of one request, however you "
            f"requested {least}: shorten the prompt or the answer.",
            "max_tokens" if prompt_tokens < capacity else "prompt",
        )
    limit = context if capacity is None else min(context, capacity)
    return limit - prompt_tokens if max_tokens is None else max_tokens


def to_wire(
    sampling: api.Sampling, *, eos: tuple[int, ...], seed: int, max_tokens: int
) -> wire.Sampling:
    """The same for a worker. `seed` is the request's own or one drawn for it."""
    stops = () if sampling.ignore_eos else eos
    return wire.Sampling(
        temperature=sampling.temperature,
        top_k=max(sampling.top_k, 0),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=seed,
        # A worker always makes a token; the answer of a request that wants none leaves it out.
        max_tokens=max(max_tokens, 1),
        min_tokens=min(sampling.min_tokens, max_tokens),
        logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        prompt_logprobs=-1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs,
        stop_token_ids=tuple(dict.fromkeys((*stops, *sampling.stop_token_ids))),
        logit_bias=tuple(sampling.logit_bias.items()),
        allowed_token_ids=sampling.allowed_token_ids or (),
    )


def capped(sampling: wire.Sampling, room: int, *, scores_prompt: bool) -> wire.Sampling:
    """The same with an answer of at most `room` tokens; `scores_prompt` False: the client has had
    the prompt's probabilities."""
    prompt_logprobs = sampling.prompt_logprobs if scores_prompt else -1
    if sampling.max_tokens <= room and sampling.prompt_logprobs == prompt_logprobs:
        return sampling
    return msgspec.structs.replace(
        sampling,
        max_tokens=min(sampling.max_tokens, room),
        min_tokens=min(sampling.min_tokens, room),
        prompt_logprobs=prompt_logprobs,
    )


def _check_lengths(sampling: api.Sampling) -> None:
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens must be at least 1, got 0 (0 is for prompt_logprobs alone).", "max_tokens"
        )
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, got {sampling.min_tokens} and "
            f"{sampling.max_tokens}.",
            "min_tokens",
        )


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}.", "stop")
    if "" in stops:
        raise InvalidRequest("stop strings must not be empty.", "stop")
