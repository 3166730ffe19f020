"""Engines that are HTTP servers: started together, asked by the load process, stopped together."""

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from bench.dialects import Route
from bench.job import Job, Outcome
from bench.load import run
from bench.peers.peer import PeerMissing
from bench.processes import end, family

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Command:
    """One server: how it is started and where it then listens."""

    words: Sequence[str | Path]
    port: int
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


class Served:
    """`with Served(...) as playing` runs `commands` until the block ends; requests for a variant go
    where `routes` says."""

    def __init__(
        self, commands: Sequence[Command], routes: Mapping[str, Route], log: Path, limit_s: float
    ) -> None:
        self._commands = commands
        self._routes = dict(routes)
        self._log = log
        self._limit_s = limit_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Start them all and wait until each is healthy. Raises PeerMissing."""
        began = time.perf_counter()
        with ExitStack() as stack:
            for command in self._commands:
                process = self._start(command)
                stack.callback(end, process)
                self._processes.append(process)
            for command, process in zip(self._commands, self._processes, strict=True):
                self._wait(command, process, began + self._limit_s)
            self._stack = stack.pop_all()
        self.start_s = time.perf_counter() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop them all."""
        self._stack.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Playing`."""
        return tuple(pid for process in self._processes for pid in family(process.pid))

    def play(self, job: Job) -> Outcome:
        """See `Playing`."""
        return run(msgspec.structs.replace(job, routes=self._routes))

    def spent(self) -> dict[str, float]:
        """See `Playing`."""
        return {}

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            try:
                return subprocess.Popen(
                    [str(word) for word in command.words],
                    env=dict(os.environ) | dict(command.variables),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            except OSError as error:
                raise PeerMissing(f"{command.words[0]} cannot be started: {error}") from error

    def _wait(self, command: Command, process: subprocess.Popen[bytes], until: float) -> None:
        while not _is_healthy(command.url):
            if process.poll() is not None:
                raise PeerMissing(f"a server ended while it started: see {self._log}")
            if time.perf_counter() > until:
                raise PeerMissing(
                    f"a server was not ready after {self._limit_s:g} s: see {self._log}"
                )
            time.sleep(_POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
