"""BlockLLM as one of the peers: the real server, asked over the same HTTP by the same load process.

Beside the mixes it also plays the base alone, on the server that holds the mix, so that the cost of
a mix is a ratio of runs side by side.
"""

from collections.abc import Callable, Sequence
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
from zoo.errors import ZooError

NAME = "BlockLLM"
ALONE = f"{NAME}, only the base asked"
LAST_LAYERS = f"{NAME}, last 4 layers tuned"
EXACT = f"{NAME}, all tuned, exact"
DELTA = f"{NAME}, all tuned, deltas"
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
        zoos = self._stage.zoos
        plain = self._starter(lambda: zoos.plain)
        adapters = self._starter(lambda: zoos.loras)
        lasts = self._starter(lambda: zoos.lasts)
        fulls = self._starter(lambda: zoos.fulls)
        deltas = self._starter(lambda: zoos.tuned("delta", _HELD_OUT_ROWS))
        base = ("one", "8", "32", "prefill", "first", "cached")
        return [
            Arrangement(NAME, "base", base, plain, is_ours=True),
            Arrangement(NAME, "adapters", ("loras", "trace"), adapters, is_ours=True),
            Arrangement(ALONE, "adapters", ("loras",), adapters, (BASE,), is_ours=True),
            Arrangement(LAST_LAYERS, "tunes", ("tunes",), lasts, (BASE, *LAST), is_ours=True),
            Arrangement(ALONE, "tunes", ("tunes",), lasts, (BASE,), is_ours=True),
            Arrangement(EXACT, "tunes", ("tunes",), fulls, (BASE, *FULLS), is_ours=True),
            Arrangement(DELTA, "tunes", ("tunes",), deltas, (BASE, *TUNES), is_ours=True),
        ]

    def _starter(self, zoo: Callable[[], Path]) -> Callable[[], "OurServer"]:
        return lambda: OurServer(self._stage, zoo)


class OurServer:
    """`with OurServer(...) as playing` serves a zoo, which is made first if it is not there."""

    def __init__(self, stage: Stage, zoo: Callable[[], Path]) -> None:
        self._stage = stage
        self._zoo = zoo
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Raises PeerMissing if the zoo cannot be made or the server does not start."""
        try:
            zoo = self._zoo()
            self._server = self._stage.server(zoo).__enter__()
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
