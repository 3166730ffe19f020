"""Worker processes: greeted, watched, restarted."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import zmq

from engine.child import Child
from engine.config import Config
from engine.fleet import Fleet, WorkerFailed
from tests.engine import rig
from workers import wire


class Crew:
    """Writes down what a fleet tells it."""

    def __init__(self) -> None:
        self.hellos: list[wire.Hello] = []
        self.reports: list[tuple[str, wire.Report]] = []
        self.lost: list[str] = []

    def on_report(self, worker: str, report: wire.Report) -> None:
        if isinstance(report, wire.Hello):
            self.hellos.append(report)
        self.reports.append((worker, report))

    def on_lost(self, worker: str, reason: str) -> None:
        assert reason
        self.lost.append(worker)


@contextlib.asynccontextmanager
async def fleet(num_workers: int = 1, **settings: float) -> AsyncIterator[tuple[Fleet, Crew]]:
    with tempfile.TemporaryDirectory(prefix="blk-") as folder:
        made = Fleet(Config(**settings), ["cpu"] * num_workers, Path(folder), rig.COMMANDS.worker)
        crew = Crew()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(made.run(crew, Path(folder)))
            try:
                yield made, crew
            finally:
                await made.stop(5.0)
                running.cancel()


def test_every_worker_greets_and_reports() -> None:
    async def test() -> None:
        async with fleet(2) as (_, crew):
            await rig.until(lambda: len(crew.hellos) == 2)
            assert {hello.name for hello in crew.hellos} == {"cpu-0.1", "cpu-1.1"}
            told = lambda: {n for n, r in crew.reports if isinstance(r, wire.Status)}  # noqa: E731
            await rig.until(lambda: len(told()) == 2)

    rig.run(test())


@pytest.mark.parametrize("fields", [{}, {"version": 99}])
def test_a_worker_may_greet_before_its_start_is_over(
    fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, **fields)
    spawn = Child.spawn
    started: list[Child] = []

    async def late(command: Sequence[str]) -> Child:
        child = await spawn(command)
        await asyncio.sleep(1.0)
        started.append(child)
        return child

    monkeypatch.setattr(Child, "spawn", late)

    async def test() -> None:
        if fields:
            with pytest.RaisesGroup(pytest.RaisesExc(WorkerFailed, match="cannot be started")):
                async with asyncio.timeout(20):
                    await _run_alone()
        else:
            async with fleet() as (_, crew):
                await rig.until(lambda: len(crew.hellos) == len(started) == 1)

    rig.run(test())


def test_workers_leave_in_order_when_asked() -> None:
    async def test() -> None:
        async with fleet() as (made, crew):
            await rig.until(lambda: len(crew.hellos) == 1)
        assert made.counts["restarts"] == 0
        assert not crew.lost
        with pytest.raises(ProcessLookupError):
            os.kill(crew.hellos[0].pid, 0)

    rig.run(test())


def test_a_dead_worker_is_replaced_under_another_name() -> None:
    async def test() -> None:
        async with fleet() as (made, crew):
            await rig.until(lambda: len(crew.hellos) == 1)
            os.kill(crew.hellos[0].pid, signal.SIGKILL)
            await rig.until(lambda: len(crew.hellos) == 2)
            assert crew.lost == ["cpu-0.1"]
            assert crew.hellos[1].name == "cpu-0.2"
            assert made.counts["restarts"] == 1

    rig.run(test())


def test_a_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    rig.script(monkeypatch, silent_after_s=0.2)

    async def test() -> None:
        async with fleet(worker_timeout=1.0) as (_, crew):
            await rig.until(lambda: len(crew.hellos) == 1)
            monkeypatch.delenv("FAKEWORKER")
            await rig.until(lambda: crew.lost == ["cpu-0.1"])
            await rig.until(lambda: len(crew.hellos) == 2)

    rig.run(test())


@pytest.mark.parametrize("fields", [{"exits_at_once": True}, {"version": 99}])
def test_a_worker_that_cannot_start_ends_the_engine(
    fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, **fields)

    async def test() -> None:
        with pytest.RaisesGroup(pytest.RaisesExc(WorkerFailed, match="cannot be started")):
            async with asyncio.timeout(20):
                await _run_alone()

    rig.run(test())


async def _run_alone() -> None:
    with tempfile.TemporaryDirectory(prefix="blk-") as folder:
        made = Fleet(Config(), ["cpu"], Path(folder), rig.COMMANDS.worker)
        try:
            await made.run(Crew(), Path(folder))
        finally:
            await made.stop(1.0)


def test_strangers_on_the_workers_socket_are_ignored() -> None:
    async def test() -> None:
        async with fleet() as (made, crew):
            await rig.until(lambda: len(crew.hellos) == 1)
            context = zmq.Context()
            socket = context.socket(zmq.DEALER)
            socket.linger = 1000
            socket.connect(made._endpoint)
            socket.send(wire.encode(wire.Drained()))
            await rig.until(lambda: made.counts["stray"] == 1)
            socket.close()
            context.term()
            assert not crew.lost

    rig.run(test())
