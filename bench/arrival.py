"""A variant that is added while streams decode: how soon it answers, and whom that held up."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from itertools import pairwise

import msgspec
import uvloop

from bench.adder import Adding
from bench.job import FIRST_PLAIN_TOKEN
from bench.load import LoadFailed
from engine.client import AsyncClient
from engine.errors import ModelNotFound

_ASK_AGAIN_S = 0.02
_LIMIT_S = 120.0


class Streams(msgspec.Struct, frozen=True):
    """Who decodes meanwhile: `count` streams over `models`, with prompts of `prompt` random tokens
    and answers of `tokens`; for `settle_s` before the variant is added and after it answered."""

    models: tuple[str, ...]
    count: int
    prompt: int
    tokens: int
    vocabulary: int
    settle_s: float = 1.0


class Arrival(msgspec.Struct, frozen=True):
    """`first_token_s` counts from the time that the catalog has for the variant. Gaps are the
    longest between two tokens of one answer, in seconds, while all streams run: before it was added
    and from then on. `renewed` streams came to the end of an answer and began another."""

    first_token_s: float
    gap_before_s: float
    gap_s: float
    renewed: int


def watch(endpoint: str, streams: Streams, adding: Adding) -> Arrival:
    """Add the variant once all streams run. Raises LoadFailed."""
    try:
        return uvloop.run(_watch(endpoint, streams, adding))
    except TimeoutError as error:
        raise LoadFailed(f"{adding.name} did not answer within {_LIMIT_S:g} s") from error
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise LoadFailed(f"{adding.name} and the streams beside it failed: {first}") from errors


class _Watched:
    """The streams on their way: when the tokens of each answer came, and whether all streams have
    begun."""

    def __init__(self, client: AsyncClient, streams: Streams) -> None:
        self._client = client
        self._streams = streams
        self._begun: set[int] = set()
        self.times: list[list[float]] = []
        self.running = asyncio.Event()

    @property
    def renewed(self) -> int:
        """Answers beyond the first of each stream."""
        return len(self.times) - self._streams.count

    async def follow(self, number: int, prompt: list[int]) -> None:
        """One answer after the other, until this is cancelled."""
        models = self._streams.models
        while True:
            times: list[float] = []
            self.times.append(times)
            answer = self._client.stream(
                models[number % len(models)],
                prompt,
                max_tokens=self._streams.tokens,
                temperature=0.0,
                ignore_eos=True,
            )
            async with aclosing(answer):
                async for _ in answer:
                    times.append(time.time())
                    self._begun.add(number)
                    if len(self._begun) == self._streams.count:
                        self.running.set()

    def longest(self, first: float, last: float) -> float:
        """The longest gap between two tokens of an answer that ends within [first, last)."""
        gaps = (
            after - before
            for one in self.times
            for before, after in pairwise(one)
            if first <= after < last
        )
        return max(gaps, default=0.0)


async def _watch(endpoint: str, streams: Streams, adding: Adding) -> Arrival:
    draw = random.Random(0)
    plain = range(min(FIRST_PLAIN_TOKEN, streams.vocabulary // 2), streams.vocabulary)
    *prompts, last = (draw.choices(plain, k=streams.prompt) for _ in range(streams.count + 1))
    async with (
        asyncio.timeout(_LIMIT_S),
        AsyncClient(endpoint, timeout_s=60) as client,
        asyncio.TaskGroup() as group,
    ):
        watched = _Watched(client, streams)
        tasks = [group.create_task(watched.follow(i, one)) for i, one in enumerate(prompts)]
        await watched.running.wait()
        running = time.time()
        await asyncio.sleep(streams.settle_s)
        began = time.time()
        published = group.create_task(asyncio.to_thread(adding.add))
        first = await _first_token(client, adding.name, last)
        added = await published
        await asyncio.sleep(streams.settle_s)
        renewed = watched.renewed
        for task in tasks:
            task.cancel()
    return Arrival(
        first_token_s=first - added,
        gap_before_s=watched.longest(running, began),
        gap_s=watched.longest(began, float("inf")),
        renewed=renewed,
    )


async def _first_token(client: AsyncClient, name: str, prompt: Sequence[int]) -> float:
    """When a variant that is not there yet gives its first token."""
    while True:
        with suppress(ModelNotFound):
            await client.complete(name, list(prompt), max_tokens=1, temperature=0.0)
            return time.time()
        await asyncio.sleep(_ASK_AGAIN_S)
