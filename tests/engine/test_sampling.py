"""Ranges of sampling fields, and what they mean to a worker."""

import math
from typing import Any

import pytest

from engine.api import Sampling
from engine.errors import EngineError, InvalidRequest, PromptTooLong
from engine.sampling import answer_budget, capped, check, to_wire
from workers import wire

VOCABULARY = 100


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 1 << 63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"stop_token_ids": (100,)}, "stop_token_ids"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {1: 100.5}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (5, 500)}, "allowed_token_ids"),
        ({"deadline_s": 0.0}, "deadline_s"),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(Sampling(**fields), VOCABULARY)
    assert caught.value.param == name
    assert name in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.1},
        {"seed": -(1 << 63), "logprobs": 20, "stop": ("x",) * 16},
        {"stop_token_ids": (0, 99), "logit_bias": {99: -100.0}, "allowed_token_ids": (3,)},
    ],
)
def test_values_at_the_edge_are_fine(fields: dict[str, Any]) -> None:
    check(Sampling(**fields), VOCABULARY)


@pytest.mark.parametrize(
    ("prompt", "wanted", "capacity", "budget"),
    [
        (10, None, None, 90),
        (10, None, 50, 40),
        (10, 5, 50, 5),
        (10, 90, None, 90),
        (99, None, None, 1),
        (100, 0, None, 0),
    ],
)
def test_the_answer_takes_what_is_left(
    prompt: int, wanted: int | None, capacity: int | None, budget: int
) -> None:
    assert answer_budget(prompt, wanted, 100, capacity) == budget


@pytest.mark.parametrize(
    ("prompt", "wanted", "capacity", "told", "param"),
    [
        (100, None, None, "maximum context length is 100 tokens", "prompt"),
        (10, 91, None, "101 tokens (10 in the prompt, 91 for the answer)", "max_tokens"),
        (10, 50, 40, "holds 40 tokens", "max_tokens"),
        (50, None, 40, "holds 40 tokens", "prompt"),
    ],
)
def test_too_long_says_what_there_is_and_what_was_asked(
    prompt: int, wanted: int | None, capacity: int | None, told: str, param: str
) -> None:
    with pytest.raises(PromptTooLong) as caught:
        answer_budget(prompt, wanted, 100, capacity)
    assert told in str(caught.value)
    assert caught.value.param == param
    assert isinstance(caught.value, EngineError)


def test_end_tokens_go_to_the_worker_unless_ignored() -> None:
    asked = Sampling(stop_token_ids=(7, 2))
    made = to_wire(asked, eos=(2, 3), seed=5, max_tokens=10)
    assert (made.stop_token_ids, made.seed, made.max_tokens) == ((2, 3, 7), 5, 10)
    ignoring = Sampling(stop_token_ids=(7,), ignore_eos=True)
    assert to_wire(ignoring, eos=(2, 3), seed=5, max_tokens=10).stop_token_ids == (7,)


def test_absent_values_have_their_wire_form() -> None:
    made = to_wire(Sampling(top_k=-1), eos=(), seed=0, max_tokens=0)
    assert (made.top_k, made.logprobs, made.prompt_logprobs, made.max_tokens) == (0, -1, -1, 1)


def test_a_cap_shortens_and_keeps_the_rest() -> None:
    made = wire.Sampling(max_tokens=10, min_tokens=8, prompt_logprobs=2, temperature=0.5)
    assert capped(made, 10, scores_prompt=True) is made
    short = capped(made, 5, scores_prompt=False)
    assert (short.max_tokens, short.min_tokens, short.prompt_logprobs) == (5, 5, -1)
    assert short.temperature == 0.5
