"""BlockLLM as one of the peers: the real server, asked over the same HTTP by the same load process.

It is run twice: exact, and with `--dtype bfloat16`, which is what peers do whose names end in bf16.
Tokens are guessed ahead over real text alone: no peer does that as it is run here, and what random
prompts make a model say goes round in circles, which are easy to guess.
Beside the mixes it also plays the base alone, on the server that holds the mix, so that the cost of
a mix is a ratio of runs side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from bench.dialects import Route
from bench.job import Job, Outcome
from bench.load import run
from bench.peers.peer import Arrangement, PeerMissing
from bench.server import ServerFailed
from bench.stage import Stage
from bench.tunes import TUNES
from bench.zoos import BASE, FULLS, LAST, variants
from engine.config import Config
from zoo.errors import ZooError

NAME, ROUNDED = "BlockLLM", "BlockLLM bf16"
GUESSING = "guessing ahead"
ALONE, LAST_LAYERS = "only the base asked", "last 4 layers tuned"
EXACT, DELTA = "all tuned, exact", "all tuned, deltas"
# Room for 6,500 tokens: 32 requests of 192, which is the most that a cell has at once.
_KV_BYTES = 288 << 20
FLAGS = {
    NAME: ("--kv-cache-memory-bytes", str(_KV_BYTES)),
    ROUNDED: ("--kv-cache-memory-bytes", str(_KV_BYTES // 2), "--dtype", "bfloat16"),
}
_GUESSES = ("--num-speculative-tokens", str(Config().num_speculative_tokens))
# What the deltas are measured on when their zoo is made.
_HELD_OUT_ROWS = 64


class Ours:
    """See the module's text."""

    name = NAME

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def install(self) -> str:
        """See `Peer`."""
        return "this commit"

    def arrangements(self) -> Sequence[Arrangement]:
        """See `Peer`."""
        return [one for name in FLAGS for one in self._ways(name)]

    def _ways(self, name: str) -> Iterator[Arrangement]:
        zoos = self._stage.zoos
        plain = self._starter(name, lambda: zoos.plain)
        adapters = self._starter(name, lambda: zoos.loras)
        lasts = self._starter(name, lambda: zoos.lasts)
        fulls = self._starter(name, lambda: zoos.fulls)
        deltas = self._starter(name, lambda: zoos.tuned("delta", _HELD_OUT_ROWS))
        base = ("one", "text", "8", "32", "prefill", "first", "cached")
        guessing = self._starter(name, lambda: zoos.plain, *_GUESSES)
        yield Arrangement(f"{name}, {GUESSING}", "base", ("text",), guessing, is_ours=True)
        yield Arrangement(name, "base", base, plain, is_ours=True)
        yield Arrangement(name, "adapters", ("loras", "trace"), adapters, is_ours=True)
        for group, cell, start, what, models in (
            ("adapters", "loras", adapters, ALONE, (BASE,)),
            ("tunes", "lasts", lasts, LAST_LAYERS, (BASE, *LAST)),
            ("tunes", "lasts", lasts, ALONE, (BASE,)),
            ("tunes", "tunes", fulls, EXACT, (BASE, *FULLS)),
            ("tunes", "tunes", deltas, DELTA, (BASE, *TUNES)),
        ):
            yield Arrangement(
                f"{name}, {what}",
                group,
                (cell,),
                start,
                models,
                is_ours=True,
                own_prompts=what == ALONE,
            )

    def _starter(
        self, name: str, zoo: Callable[[], Path], *flags: str
    ) -> Callable[[], "OurServer"]:
        return lambda: OurServer(self._stage, zoo, (*FLAGS[name], *flags))


class OurServer:
    """`with OurServer(...) as playing` serves a zoo, which is made first if it is not there."""

    def __init__(self, stage: Stage, zoo: Callable[[], Path], flags: Sequence[str]) -> None:
        self._stage = stage
        self._zoo = zoo
        self._flags = flags
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Raises PeerMissing if the zoo cannot be made or the server does not start."""
        try:
            zoo = self._zoo()
            self._server = self._stage.server(zoo, *self._flags).__enter__()
        except (ZooError, ServerFailed) as error:
            raise PeerMissing(str(error)) from error
        names = [variant.name for variant in variants(zoo)]
        self._routes = {name: Route(urls=(self._server.url,), model=name) for name in names}
        self.start_s = self._server.ready_s
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self._server.__exit__(kind, error, trace)

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Playing`."""
        return self._server.pids

    def play(self, job: Job) -> Outcome:
        """See `Playing`."""
        return run(msgspec.structs.replace(job, routes=self._routes))

    def spent(self) -> dict[str, float]:
        """See `Playing`: the clocks of the worker's loop."""
        return self._server.status()["workers"][0]["seconds"]
