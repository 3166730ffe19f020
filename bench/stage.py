"""What a scenario is given: zoos, the machine's limits, how thorough to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.job import Job, Outcome
from bench.load import run
from bench.machine import Busy
from bench.result import Result
from bench.server import Server
from bench.zoos import Zoos

_NO_GUESSES = ("--num-speculative-tokens", "0")


@dataclass(frozen=True, slots=True)
class Trace:
    """What the replay plays: a file or "synthetic", and how fast."""

    source: str = "synthetic"
    speed: float = 1.0
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """Which peers are compared (none: all), in which cells, and where they are installed (None:
    beside the zoos)."""

    only: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    root: Path | None = None


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """What the GPU scenario measures: the kind of device ("auto": a GPU), and shapes as
    `zoo.dummy.recipe` names them (empty: what suits the device)."""

    device: str = "auto"
    shapes: str = ""


@dataclass(frozen=True, slots=True)
class Played:
    """A load that was run: its outcome, the cores that others kept busy meanwhile, and the CPU time
    of the server, which other processes disturb less than the clock."""

    outcome: Outcome
    others: float
    server_cpu_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a scenario plays. `flags` are more flags for every server, `say` shows progress."""

    zoos: Zoos
    quick: bool
    flags: tuple[str, ...]
    say: Callable[[str], None]
    trace: Trace = Trace()
    peers: PeerChoice = PeerChoice()
    gpu: GpuChoice = GpuChoice()

    def server(self, zoo: Path, *flags: str) -> Server:
        """A server over `zoo`, to be entered. Unless flags say so no tokens are guessed ahead: what
        random prompts make a model say goes round in circles, which are easy to guess."""
        return Server(zoo, self.zoos.log, *_NO_GUESSES, *flags, *self.flags)

    def load(self, server: Server, job: Job) -> Played:
        """Run a job against a server."""
        busy = Busy(server.pids)
        outcome = run(job)
        return Played(outcome, busy.others(outcome.cpu_s), busy.own_s())


Scenario = Callable[[Stage], Iterator[Result]]
