"""A load from a process of its own: `python -m bench.load '<Job as JSON>'` prints an Outcome.

`run` is what the scenarios call: it starts that process and reads its answer.
"""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence

import msgspec
import uvloop

from bench.dialects import Route
from bench.doors import Door, RoutedDoor, ZmqDoor
from bench.job import Ask, Job, Outcome, asks
from bench.machine import ROOT
from bench.piece import Piece
from bench.spread import spread
from engine.client import AsyncClient
from engine.errors import EngineError

_MOST_ERRORS = 5


class LoadFailed(Exception):
    """A load process did not do its work; the message is its last words."""


class Tally:
    """What has happened so far; see `Job.settling_s`."""

    def __init__(self, settling_s: float = 0.0) -> None:
        self.settling_s = settling_s
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.errors: list[str] = []
        self.ttft: list[float] = []
        self.itl: list[float] = []
        self.e2e: list[float] = []
        self.lag: list[float] = []

    def ended(self, ask: Ask, last: Piece, received: int, seconds: float) -> None:
        """An answer is whole."""
        self.finished[last.reason or "none"] += 1
        told = last.usage.completion_tokens if last.usage else -1
        cached = last.usage.cached_tokens if last.usage else 0
        self.sums.update(told=told, cached=cached, mismatched=int(told != received))
        self.sums["prompt"] += len(ask.prompt)
        self.e2e.append(seconds)

    def failed(self, error: Exception) -> None:
        """The engine refused, or could not be reached."""
        self.refused[type(error).__name__] += 1
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append(str(error))


def run(job: Job, *, timeout_s: float = 900.0) -> Outcome:
    """Load the engine from another process. Raises LoadFailed."""
    command = [sys.executable, "-m", "bench.load", msgspec.json.encode(job).decode()]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"a load of {job.requests} requests took over {timeout_s:g} s") from error
    if done.returncode != 0:
        raise LoadFailed(done.stderr.decode(errors="replace")[-2000:])
    return msgspec.json.decode(done.stdout, type=Outcome)


async def drive(job: Job) -> Outcome:
    """Do the job on this event loop."""
    todo = asks(job)
    tally = Tally(job.settling_s)
    async with _doors(job) as doors:
        began, cpu = time.perf_counter(), time.process_time()
        if job.trace:
            await open_loop(todo, doors, tally)
        else:
            await closed_loop(todo, doors, tally, job.streams)
        seconds = time.perf_counter() - began
    return _outcome(todo, tally, seconds, time.process_time() - cpu)


@contextlib.asynccontextmanager
async def _doors(job: Job) -> AsyncIterator[list[Door]]:
    """Connected before the clock starts."""
    num_http = job.connections if job.routes else round(job.connections * job.http_share)
    routes = job.routes or {name: Route(urls=(job.url,), model=name) for name in job.models}
    async with contextlib.AsyncExitStack() as stack:
        doors: list[Door] = []
        for number in range(job.connections):
            if number < num_http:
                door = RoutedDoor(routes)
                stack.callback(door.close)
                doors.append(door)
            else:
                client = await stack.enter_async_context(AsyncClient(job.endpoint, timeout_s=60))
                await client.models()
                doors.append(ZmqDoor(client))
        yield doors


async def closed_loop(
    todo: Sequence[Ask], doors: Sequence[Door], tally: Tally, streams: int
) -> None:
    left = deque(todo)

    async def stream(door: Door) -> None:
        while left:
            await _ask(door, left.popleft(), tally)

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(stream(doors[number % len(doors)]))


async def open_loop(todo: Sequence[Ask], doors: Sequence[Door], tally: Tally) -> None:
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, ask in enumerate(todo):
            await asyncio.sleep(max(0.0, began + ask.at_s - time.perf_counter()))
            tally.lag.append(time.perf_counter() - began - ask.at_s)
            group.create_task(_ask(doors[number % len(doors)], ask, tally))


async def _ask(door: Door, ask: Ask, tally: Tally) -> None:
    """One request from its sending to its end, whatever that is."""
    received = 0
    has_ended = False
    began = time.perf_counter()
    before: float | None = None
    try:
        async with (
            asyncio.timeout(ask.leave_after_s),
            contextlib.aclosing(door.pieces(ask)) as pieces,
        ):
            async for piece in pieces:
                now = time.perf_counter()
                if piece.index != received:
                    raise EngineError(f"token {piece.index} came where {received} was due")
                if piece.tokens:
                    received += len(piece.tokens)
                    if before is None:
                        tally.ttft.append(now - began)
                    elif now - began >= tally.settling_s:
                        tally.itl.append((now - before) / len(piece.tokens))
                    before = now
                if piece.reason is not None:
                    has_ended = True
                    tally.ended(ask, piece, received, now - began)
    except TimeoutError:
        if not has_ended:
            tally.sums.update(left=1, left_tokens=received)
    except (EngineError, OSError, EOFError) as error:
        tally.failed(error)
    tally.sums["output"] += received


def _outcome(todo: Sequence[Ask], tally: Tally, seconds: float, cpu_s: float) -> Outcome:
    sums = tally.sums
    ttft, itl, e2e, lag = (
        spread([1000 * value for value in values])
        for values in (tally.ttft, tally.itl, tally.e2e, tally.lag)
    )
    return Outcome(
        requests=len(todo),
        finished=dict(tally.finished),
        left=sums["left"],
        refused=dict(tally.refused),
        mismatched=sums["mismatched"],
        prompt_tokens=sums["prompt"],
        output_tokens=sums["output"],
        left_tokens=sums["left_tokens"],
        told_tokens=sums["told"],
        cached_tokens=sums["cached"],
        seconds=seconds,
        tokens_per_s=sums["output"] / seconds,
        cpu_s=cpu_s,
        ttft_ms=ttft,
        itl_ms=itl,
        e2e_ms=e2e,
        lag_ms=lag,
        errors=tuple(tally.errors),
    )


def main(argument: str) -> int:
    """Do a job and print its outcome."""
    outcome = uvloop.run(drive(msgspec.json.decode(argument, type=Job)))
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
