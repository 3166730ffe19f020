"""Whether shared prefixes are computed once, by the workers' counters.

`asked` are the prompt tokens of a cell, `found` those that the prefix cache had, `due` those it had
to have: full pages of 16 tokens, never a prompt's last token. `pages` counts (page x layer) pieces
taken from the cache instead of computed, against `due pages`. For two variants that part at a
layer, the pages of the layers below are due, and no others.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.job import FIRST_PLAIN_TOKEN
from bench.result import Result
from bench.server import Server
from bench.stage import Stage
from bench.zoos import BASE, LAST, LORAS, variants
from engine.client import AsyncClient
from zoo.catalog import Catalog
from zoo.manifest import attention_of

_PAGE = 16
_SYSTEM, _OWN, _USERS = 256, 24, 8
_PROMPT = 200


@dataclass(frozen=True, slots=True)
class Layers:
    """Attention layers of the base, and how many of them a fine-tune of the last ones shares."""

    all: int
    shared: int


@dataclass(frozen=True, slots=True)
class Due:
    """What must come from the cache: tokens, and pages of one layer each."""

    tokens: int
    pages: int


def run(stage: Stage) -> Iterator[Result]:
    """Four cells, each with prompts of its own."""
    zoo = stage.zoos.whole
    layers = _layers(zoo)
    draw = random.Random(7)
    vocabulary = variants(zoo)[0].vocabulary

    def text(length: int) -> list[int]:
        return [draw.randrange(FIRST_PLAIN_TOKEN, vocabulary) for _ in range(length)]

    columns = (_PROMPT - 1) // _PAGE
    system = _SYSTEM // _PAGE * _PAGE
    users = _USERS - 1
    with stage.server(zoo) as server:
        cells = Cells(server)
        prompt = text(_PROMPT)
        yield cells.measure(
            "a prompt sent twice",
            [[(BASE, prompt)], [(BASE, prompt)]],
            Due(columns * _PAGE, columns * layers.all),
        )
        shared = text(_SYSTEM)
        yield cells.measure(
            "one system prompt, 8 users at once",
            [[(BASE, shared + text(_OWN)) for _ in range(_USERS)]],
            Due(users * system, users * system // _PAGE * layers.all),
        )
        prompt = text(_PROMPT)
        yield cells.measure(
            f"base, then a variant that parts at layer {layers.shared}",
            [[(BASE, prompt)], [(LAST[0], prompt)]],
            Due(columns * _PAGE, columns * layers.shared),
        )
        prompt = text(_PROMPT)
        yield cells.measure(
            "two adapters that share nothing",
            [[(LORAS[0], prompt)], [(LORAS[1], prompt)]],
            Due(0, 0),
        )


class Cells:
    """Sends prompts and reads what the counters made of them."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def measure(
        self, name: str, waves: Sequence[Sequence[tuple[str, list[int]]]], due: Due
    ) -> Result:
        """Send each wave at once, the next when it has ended."""
        before = self._counters()
        seconds = asyncio.run(self._send(waves))
        after = self._counters()
        change = {key: after[key] - before[key] for key in after}
        found, pages = change["prefix_hit_tokens"], change["shared_pages"]
        return Result(
            scenario="prefix",
            cell=name,
            figures={
                "asked": change["prefix_query_tokens"],
                "found": found,
                "due": due.tokens,
                "pages": pages,
                "due pages": due.pages,
                "first s": seconds[0],
                "last s": seconds[-1],
            },
            checks={
                "every shared token was found": found == due.tokens,
                "every shared page was taken": pages == due.pages,
            },
            detail={"counters": change},
        )

    async def _send(self, waves: Sequence[Sequence[tuple[str, list[int]]]]) -> list[float]:
        """Seconds per wave."""
        clock = asyncio.get_running_loop().time
        seconds: list[float] = []
        async with AsyncClient(self._server.endpoint, timeout_s=60) as client:
            for wave in waves:
                began = clock()
                async with asyncio.TaskGroup() as group:
                    for model, prompt in wave:
                        group.create_task(
                            client.complete(model, prompt, max_tokens=1, temperature=0.0)
                        )
                seconds.append(clock() - began)
        return seconds

    def _counters(self) -> dict[str, Any]:
        counters = self._server.status()["counters"]
        return {
            name: counters[name]
            for name in (
                "prefix_query_tokens",
                "prefix_hit_tokens",
                "shared_pages",
                "prompt_tokens",
            )
        }


def _layers(zoo: Path) -> Layers:
    with closing(Catalog(zoo)) as catalog:
        base, tuned = (catalog.chain(catalog.variant(name).chain) for name in (BASE, LAST[0]))
        kinds = [attention_of(catalog.unit(unit).spec) is not None for unit in base.units]
    parts_at = next(
        i for i, (a, b) in enumerate(zip(base.units, tuned.units, strict=True)) if a != b
    )
    return Layers(sum(kinds), sum(kinds[:parts_at]))
