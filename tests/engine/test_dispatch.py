"""Requests and workers: deaths, replays, queues, deadlines, capacities."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from engine.client import AsyncClient
from engine.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from engine.launch import Engine
from tests.engine import rig
from workers.wire import ChainId


def test_answers_go_on_after_the_worker_is_killed(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.01)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            victim = (await client.status())["workers"][0]["pid"]
            streams = [client.stream("base", [65 + number], max_tokens=120) for number in range(8)]
            tokens: list[list[int]] = [[] for _ in streams]
            for stream, mine in zip(streams, tokens, strict=True):
                mine.extend((await anext(stream)).token_ids)
            os.kill(victim, signal.SIGKILL)
            for stream, mine in zip(streams, tokens, strict=True):
                async for chunk in stream:
                    mine.extend(chunk.token_ids)
            assert tokens == [rig.expected(65 + number, 120) for number in range(8)]
            status = await client.status()
            assert status["counts"]["fleet"]["restarts"] == 1
            assert status["workers"][0]["pid"] != victim
            await rig.until(lambda: rig.has_counted(built, "replays", 8))

    rig.run(test())


def test_a_request_that_loses_every_worker_is_given_up(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.02)

    async def kill_again_and_again(built: Engine) -> None:
        async with rig.client(built) as client:
            killed: set[int] = set()
            while len(killed) < 3:
                for worker in (await client.status())["workers"]:
                    if worker["opened"] and worker["pid"] not in killed:
                        os.kill(worker["pid"], signal.SIGKILL)
                        killed.add(worker["pid"])
                await asyncio.sleep(0.05)

    async def test() -> None:
        async with (
            rig.engine(zoo) as built,
            rig.client(built) as client,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(kill_again_and_again(built))
            with pytest.raises(EngineFailed, match="3 times"):
                await client.complete("base", [65], max_tokens=250)

    rig.run(test())


def test_a_full_queue_refuses_and_says_when_to_come_back(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.01)

    async def test() -> None:
        settings = {"max_num_seqs": 1, "max_num_queued_reqs": 2}
        async with rig.engine(zoo, **settings) as built, rig.client(built) as client:
            first = client.stream("base", [65], max_tokens=100)
            await anext(first)
            async with asyncio.TaskGroup() as group:
                queued = [
                    group.create_task(client.complete("base", [66], max_tokens=2)) for _ in range(2)
                ]
                await rig.until(lambda: _waiting(built, 2))
                with pytest.raises(Overloaded) as caught:
                    await client.complete("base", [67], max_tokens=2)
                assert caught.value.retry_after_s >= 1
                await first.aclose()
                for task in queued:
                    assert (await task).finish_reason == "length"

    rig.run(test())


async def _waiting(built: Engine, count: int) -> bool:
    async with rig.client(built) as client:
        return (await client.status())["requests"]["waiting"] == count


def test_a_deadline_ends_a_request(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.script(monkeypatch, interval_s=0.05)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            with pytest.raises(DeadlineExceeded):
                await client.complete("base", [65], max_tokens=200, deadline_s=0.3)
            await rig.until(lambda: rig.has_counted(built, "closes", 1))

    rig.run(test())


def test_a_busy_tenant_does_not_hold_up_another(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a alice\nb bob\n")
    rig.script(monkeypatch, interval_s=0.005)

    async def test() -> None:
        settings = {"api_keys": str(keys), "max_num_seqs": 1}
        async with (
            rig.engine(zoo, **settings) as built,
            rig.client(built, "a") as alice,
            rig.client(built, "b") as bob,
        ):
            done: list[str] = []

            async def ask(client: AsyncClient, name: str) -> None:
                await client.complete("base", [65], max_tokens=10)
                done.append(name)

            async with asyncio.TaskGroup() as group:
                for _ in range(30):
                    group.create_task(ask(alice, "alice"))
                await asyncio.sleep(0.1)
                for _ in range(3):
                    group.create_task(ask(bob, "bob"))
            # All of alice's came first; bob's are done in the first half all the same.
            assert max(i for i, name in enumerate(done) if name == "bob") < 16

    rig.run(test())


def test_many_requests_of_many_clients_leave_nothing_behind(zoo: Path) -> None:
    async def ask(client: AsyncClient, number: int) -> None:
        match number % 4:
            case 0:
                await client.complete("base", [65], max_tokens=3, deadline_s=30)
            case 1:
                await client.complete("base", "hello", max_tokens=3, stop=["x"])
            case 2:
                async for _ in client.stream("base", [66], max_tokens=100):
                    break
            case _:
                with pytest.raises(InvalidRequest):
                    await client.complete("base", [65], top_p=2.0)

    async def test() -> None:
        async with rig.engine(zoo) as built:
            controller = built.controller
            for _ in range(3):
                async with contextlib.AsyncExitStack() as stack:
                    clients = [await stack.enter_async_context(rig.client(built)) for _ in range(8)]
                    async with asyncio.TaskGroup() as group:
                        for number in range(400):
                            group.create_task(ask(clients[number % 8], number))
            dispatch = controller._dispatch
            await rig.until(lambda: not dispatch.ledger)
            assert not controller._cluster.requests
            assert not controller._cluster.attempts
            assert not dispatch._deliveries
            assert not dispatch._deadlines
            assert len(dispatch._admission) == 0
            assert not controller._cluster.chains[ChainId(1)].requests
            worker = next(iter(controller._cluster.workers.values()))
            assert (worker.opened, worker.unstarted) == (set(), 0)

    rig.run(test())


def test_two_workers_share_the_requests_and_outlive_each_other(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.01)

    async def test() -> None:
        async with rig.engine(zoo, workers=2) as built, rig.client(built) as client:
            streams = [client.stream("base", [65 + i], max_tokens=80) for i in range(6)]
            tokens: list[list[int]] = [[] for _ in streams]
            for stream, mine in zip(streams, tokens, strict=True):
                mine.extend((await anext(stream)).token_ids)
            workers = (await client.status())["workers"]
            assert sorted(worker["opened"] for worker in workers) == [3, 3]
            os.kill(workers[0]["pid"], signal.SIGKILL)
            for stream, mine in zip(streams, tokens, strict=True):
                async for chunk in stream:
                    mine.extend(chunk.token_ids)
            assert tokens == [rig.expected(65 + number, 80) for number in range(6)]
            await rig.until(lambda: rig.has_counted(built, "replays", 3))

    rig.run(test())


def test_answers_end_where_the_pages_end(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.script(monkeypatch, capacity=40)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            whole = await client.complete("base", [65] * 10)
            assert whole.usage.completion_tokens == 30
            with pytest.raises(PromptTooLong, match="holds 40 tokens"):
                await client.complete("base", [65] * 10, max_tokens=31)
            # A variant that is not loaded yet has no pages to ask: the request learns it in time.
            rig.publish(zoo, rig.variant_of(zoo, "late"))
            with pytest.raises(PromptTooLong, match="holds 40 tokens"):
                await client.complete("late", [65] * 10, max_tokens=31)
            rig.publish(zoo, rig.variant_of(zoo, "later"))
            assert (await client.complete("later", [65] * 10)).usage.completion_tokens == 30

    rig.run(test())
