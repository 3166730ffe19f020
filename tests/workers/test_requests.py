"""Requests that wait, start and end, over pages of an arena that one of them can fill."""

import numpy as np
import pytest

from tests.workers.test_batcher import KV, chain
from workers.memory import KvMemory
from workers.pages import Arena
from workers.prefix import PrefixCache
from workers.requests import Request, Requests
from workers.wire import Sampling

PAGE = 16
PAGE_BYTES = 2 * PAGE * KV.kv_heads * KV.head_dim * 4
MODEL = chain(1, [(0, 0, 7)])
# Pages of so many columns, and less than a column more.
COLUMNS, SPARE = 4, 2


def made(requests: Requests, number: int, prompt: int, room: int) -> Request:
    tokens = np.zeros(room, np.int32)
    tokens[:prompt] = np.arange(prompt)
    request = Request(number, MODEL, Sampling(), 0, 0, 0.0, tokens, prompt, 0)
    requests.open(request)
    return request


@pytest.fixture
def requests() -> Requests:
    pages = COLUMNS * MODEL.num_layers + SPARE
    slab = pages * PAGE_BYTES
    return Requests(KvMemory(Arena(slab, slab), page=PAGE, max_sequences=4), PrefixCache())


def started(requests: Requests) -> list[int]:
    return [request.id for request in requests.start()]


def compute(requests: Requests, request: Request) -> None:
    span = request.next_span
    requests.advance(request, span, span.last - span.first)


def running(requests: Requests, room: int) -> Request:
    """The first request, its prompt of two pages computed."""
    first = made(requests, 1, prompt=2 * PAGE, room=room)
    assert started(requests) == [1]
    compute(requests, first)
    return first


def test_a_prompt_that_was_seen_starts_even_if_its_pages_are_those_it_could_share(
    requests: Requests,
) -> None:
    assert MODEL.num_layers > SPARE
    requests.close(running(requests, room=COLUMNS * PAGE))
    again = made(requests, 2, prompt=2 * PAGE, room=COLUMNS * PAGE)
    short = made(requests, 3, prompt=2, room=4)
    assert started(requests) == [2]
    assert again.found == PAGE
    compute(requests, again)
    requests.close(again)
    assert started(requests) == [3]
    assert short.slot >= 0


def test_a_prompt_that_was_seen_waits_while_others_run(requests: Requests) -> None:
    first = running(requests, room=2 * PAGE)
    again = made(requests, 2, prompt=2 * PAGE, room=COLUMNS * PAGE)
    assert started(requests) == []
    requests.close(first)
    assert started(requests) == [2]
    assert again.slot >= 0


def test_what_is_copied_is_released_when_copying_ends_badly(requests: Requests) -> None:
    requests.close(running(requests, room=2 * PAGE))
    again = made(requests, 2, prompt=2 * PAGE, room=2 * PAGE + 1)
    starting = requests.start()
    assert next(starting) is again
    copied = again.copied
    assert copied is not None
    assert copied.refs == 1
    with pytest.raises(RuntimeError):
        starting.throw(RuntimeError())
    assert (again.copied, copied.refs) == (None, 0)
