"""What a peer is: an engine that is installed apart, started, asked and stopped like ours.

A peer offers arrangements, ways to run it; each plays some cells of one group. An arrangement that
was started is asked for loads until its block ends.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from bench.job import Job, Outcome


class PeerMissing(Exception):
    """A peer cannot be had or does not run here; the message is one sentence that says why."""


class Playing(Protocol):
    """Something that serves."""

    @property
    def start_s(self) -> float:
        """From the start of the process to being ready."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """All its processes."""
        ...

    def play(self, job: Job) -> Outcome:
        """Run a load against it. Raises LoadFailed or PeerMissing."""
        ...

    def spent(self) -> dict[str, float]:
        """Seconds by what they went into, since its start; empty where it does not say."""
        ...


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A way to run an engine. `cells` are keys of `bench.peers.cells.CELLS`; those with the same
    `start` share what it starts. `models` take the place of a cell's. `own_prompts`: it is asked
    other prompts of the same lengths, because who shares its server may have left their pages."""

    name: str
    group: str
    cells: tuple[str, ...]
    start: Callable[[], AbstractContextManager[Playing]]
    models: tuple[str, ...] = ()
    is_ours: bool = False
    own_prompts: bool = False


class Peer(Protocol):
    """An engine to compare with."""

    name: str

    def install(self) -> str:
        """Get it ready to start, models converted; its version. Raises PeerMissing."""
        ...

    def arrangements(self) -> Sequence[Arrangement]:
        """How it is run, once it is installed."""
        ...
