"""A child process of the engine: it dies with the engine, and is never left behind."""

import asyncio
import contextlib
import os
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Self

_STDERR = 2
TERMINATE_S = 5.0


class Child:
    """A running process that holds the read end of a pipe from us as its stdin.

    It leaves when that pipe closes, be it because the engine was killed. It has a session of its
    own, so that a Ctrl-C reaches the engine alone, which then drains.
    """

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def spawn(cls, command: Sequence[str], *, talks: bool = False) -> Self:
        """Start `command`. `talks`: its stdout is for `line`; else it joins our stderr."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE,
            stdout=PIPE if talks else _STDERR,
            start_new_session=True,
            # Threads of a parallel loop that spin while they wait take the core from whoever they
            # wait for, when the machine has other work.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.returncode

    async def line(self) -> str:
        """The next line of its stdout; empty when there will be none."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode(errors="replace").strip()

    async def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, or None if it runs on for longer than `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._process.wait()
        return None

    def kill(self) -> None:
        """End it without asking."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, patience_s: float = TERMINATE_S) -> None:
        """Ask it to leave (SIGTERM and a closed stdin), then insist."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        if await self.wait(patience_s) is None:
            self.kill()
            await self._process.wait()
