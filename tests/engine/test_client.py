"""The clients against an engine that follows a script: answers, errors, cancellation, death."""

import asyncio
import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any, get_args

import pytest
import uvloop
import zmq

from engine import api
from engine.answers import Chunk
from engine.client import AsyncClient, Client
from engine.errors import (
    EngineError,
    EngineFailed,
    EngineUnreachable,
    InvalidRequest,
    Unauthorized,
)
from engine.options import Options
from tests.engine.fakeengine import FINGERPRINT, KEY, MODEL, FakeEngine, spell

ASK = [{"role": "user", "content": "say hello there"}]


@pytest.fixture(name="engine")
def _engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for at most half a minute."""
    uvloop.run(asyncio.wait_for(work, 30))


def test_options_are_the_fields_of_the_protocol() -> None:
    asked = {"id", "model", "prompt", "messages", "sampling", "api_key"}
    fields = {*api.Sampling.__struct_fields__, *api.Submit.__struct_fields__} - asked
    assert fields == Options.__optional_keys__


def test_answers_whole_and_in_pieces(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client:
            chunks = [chunk async for chunk in client.stream("tiny", "say one two three")]
            _check_chunks(chunks)
            answer = await client.complete("tiny", spell("say a b"), max_tokens=1, logprobs=2)
            assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", [10], "stop")
            assert answer.prompt_token_ids == spell("say a b")
            assert answer.logprobs is not None
            assert answer.logprobs[0].top == ((0, "t0", -1.0), (1, "t1", -2.0))
            assert (await client.chat("tiny", ASK)).text == "hello there"

    run(work())


def test_the_blocking_client_answers_alike(engine: FakeEngine) -> None:
    with Client(engine.endpoint) as client:
        _check_chunks(list(client.stream("tiny", "say one two three")))
        answer = client.complete("tiny", "say a b", stop="x", prompt_logprobs=1, priority=-1)
        assert (answer.text, answer.usage.prompt_tokens) == ("a b", 7)
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[0] is None
        assert len(answer.prompt_logprobs) == 7
        assert client.chat("tiny", ASK, template={"x": 1}).text == "hello there"
        assert client.models() == [MODEL]
        assert client.status()["state"] == "ready"
        assert "up 1" in client.metrics()
        assert client.tokenize("tiny", "ab") == [97, 98]
        assert client.detokenize("tiny", [97, 98]) == "ab"
    sampling = engine.submits()[1].sampling
    assert (sampling.stop, engine.submits()[1].priority) == (("x",), -1)


def _check_chunks(chunks: list[Chunk]) -> None:
    assert [chunk.text for chunk in chunks] == ["one", " two", " three", ""]
    assert [chunk.token_ids for chunk in chunks] == [[10], [11], [12], []]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk.fingerprint for chunk in chunks} == {FINGERPRINT}
    assert chunks[0].prompt_token_ids == spell("say one two three")
    assert chunks[1].prompt_token_ids is None
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (17, 3, 2)


def test_asks_the_small_things(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client:
            assert await client.models() == [MODEL]
            assert (await client.status())["ready"]
            assert "up 1" in await client.metrics()
            assert await client.tokenize("tiny", "ab") == [97, 98]
            assert await client.detokenize("tiny", [97, 98]) == "ab"

    run(work())


@pytest.mark.parametrize("reason", get_args(api.Reason))
def test_every_refusal_has_its_exception(engine: FakeEngine, reason: str) -> None:
    with Client(engine.endpoint) as client:
        with pytest.raises(EngineError) as caught:
            client.complete("tiny", f"reject {reason}")
        assert type(caught.value) is not EngineError
        assert caught.value.reason == reason
        assert str(caught.value) == f"Rejected as {reason}."
        assert (caught.value.param, caught.value.retry_after_s) == ("prompt", 1.5)
        assert client.complete("tiny", "say still here").text == "still here"


def test_a_failure_within_an_answer_is_raised_after_its_pieces(engine: FakeEngine) -> None:
    shown: list[str] = []
    with Client(engine.endpoint) as client, pytest.raises(EngineFailed, match="worker died"):
        shown.extend(chunk.text for chunk in client.stream("tiny", "break it now please"))
    with Client(engine.endpoint) as client:
        stream = client.stream("tiny", "break it now please")
        shown = [next(stream).text, next(stream).text]
        with pytest.raises(EngineFailed):
            next(stream)
    assert shown == ["break", " it"]
    assert not engine.cancelled(0.1)


def test_keys_are_sent() -> None:
    with FakeEngine(key=KEY) as engine:
        with Client(engine.endpoint) as client, pytest.raises(Unauthorized):
            client.models()
        with Client(engine.endpoint, KEY) as client:
            assert client.models() == [MODEL]
            assert client.complete("tiny", "say x").text == "x"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temprature": 1.0}, "temprature"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"priority": 1.5}, "priority"),
    ],
)
def test_wrong_options_are_named_before_they_are_sent(
    engine: FakeEngine, options: Options, param: str
) -> None:
    with Client(engine.endpoint) as client, pytest.raises(InvalidRequest) as caught:
        client.complete("tiny", "x", **options)
    assert caught.value.param == param
    assert not engine.seen


def test_requests_that_cannot_be_sent_are_refused(engine: FakeEngine) -> None:
    with Client(engine.endpoint) as client:
        for prompt in ([1 << 70], "x" * (api.MAX_REQUEST_BYTES + 1)):
            with pytest.raises(InvalidRequest):
                client.complete("tiny", prompt)
        assert client.complete("tiny", "say x", logit_bias={5: 1}).text == "x"


def test_leaving_a_stream_cancels(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client:
            async for chunk in client.stream("tiny", "hang on"):
                assert chunk.text == "hang"
                break
            gc.collect()
            assert await asyncio.to_thread(engine.cancelled)

    run(work())


def test_cancelling_a_task_cancels(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(client.complete("tiny", "hang on"))
                assert await asyncio.to_thread(engine.saw, api.Submit)
                task.cancel()
            assert await asyncio.to_thread(engine.cancelled)
            assert (await client.complete("tiny", "say x")).text == "x"

    run(work())


def test_cancelling_anywhere_leaves_nothing_behind(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client:
            for ticks in range(12):
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(client.complete("tiny", "hang on"))
                    for _ in range(ticks):
                        await asyncio.sleep(0)
                    task.cancel()
            assert (await client.complete("tiny", "say x")).text == "x"
            sent = len(engine.submits())
            assert await asyncio.to_thread(engine.saw, api.Cancel, 10, sent - 1)

    run(work())


def test_leaving_a_blocking_stream_cancels(engine: FakeEngine) -> None:
    with Client(engine.endpoint) as client:
        for chunk in client.stream("tiny", "hang on"):
            assert chunk.text == "hang"
            break
        assert engine.cancelled()


def test_blocking_streams_may_interleave(engine: FakeEngine) -> None:
    with Client(engine.endpoint) as client:
        first = client.stream("tiny", "say a b c")
        second = client.stream("tiny", "say x y z")
        assert [(next(first).text, next(second).text) for _ in range(3)] == [
            ("a", "x"),
            (" b", " y"),
            (" c", " z"),
        ]


def test_many_answers_at_once(engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.endpoint) as client, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(client.complete("tiny", f"say answer number {number}"))
                for number in range(300)
            ]
        assert [task.result().text for task in tasks] == [
            f"answer number {number}" for number in range(300)
        ]

    run(work())


def test_no_engine_is_told_within_the_timeout() -> None:
    started = time.monotonic()
    silent = Client("tcp://127.0.0.1:9", timeout_s=0.3)
    with silent as client, pytest.raises(EngineUnreachable, match="engine launch"):
        client.models()

    async def work() -> None:
        async with AsyncClient("tcp://127.0.0.1:9", timeout_s=0.3) as client:
            with pytest.raises(EngineUnreachable, match=r"127\.0\.0\.1:9"):
                await client.complete("tiny", "x")

    run(work())
    assert time.monotonic() - started < 5


def test_a_server_of_another_kind_is_no_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with Client(endpoint, timeout_s=0.3) as client, pytest.raises(EngineUnreachable):
            client.status()


def test_an_engine_that_never_replies_is_told() -> None:
    context = zmq.Context()
    mute = context.socket(zmq.ROUTER)
    port = mute.bind_to_random_port("tcp://127.0.0.1")
    silent = Client(f"tcp://127.0.0.1:{port}", timeout_s=0.3)
    with silent as client, pytest.raises(EngineUnreachable, match=r"0\.3 s"):
        client.models()
    mute.close(linger=0)
    context.term()


def test_wrong_endpoints_are_refused() -> None:
    for endpoint in ("nowhere", "tcp://", "http://127.0.0.1:8000"):
        with pytest.raises(EngineUnreachable, match="is not an endpoint"):
            Client(endpoint)


def test_the_death_of_the_engine_ends_every_answer() -> None:
    async def work() -> None:
        with FakeEngine() as engine:
            async with AsyncClient(engine.endpoint, timeout_s=0.5) as client:
                streams = [client.stream("tiny", "hang on") for _ in range(3)]
                for stream in streams:
                    await anext(stream)
                await asyncio.to_thread(engine.die)
                for stream in streams:
                    with pytest.raises(EngineUnreachable, match="went away"):
                        await anext(stream)

    run(work())


def test_the_death_of_the_engine_ends_a_blocking_answer() -> None:
    with FakeEngine() as engine, Client(engine.endpoint) as client:
        stream = client.stream("tiny", "hang on")
        next(stream)
        threading.Timer(0.2, engine.die).start()
        with pytest.raises(EngineUnreachable, match="went away"):
            next(stream)


def test_a_client_finds_the_engine_again() -> None:
    with FakeEngine() as first, Client(first.endpoint) as client:
        assert client.complete("tiny", "say one").text == "one"
        first.die()
        with FakeEngine(endpoint=first.endpoint):
            with contextlib.suppress(EngineUnreachable):
                client.complete("tiny", "say lost")
            assert client.complete("tiny", "say two").text == "two"


def test_replies_of_another_protocol_fail_the_request() -> None:
    context = zmq.Context()
    odd = context.socket(zmq.ROUTER)
    port = odd.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        for frames in ([b"HTTP", b""], [api.PROTOCOL, b"\xff"], [api.PROTOCOL]):
            peer, *_ = odd.recv_multipart()
            odd.send_multipart([peer, *frames])

    thread = threading.Thread(target=serve)
    thread.start()
    with Client(f"tcp://127.0.0.1:{port}", timeout_s=5) as client:
        for _ in range(3):
            with pytest.raises(EngineFailed, match="version"):
                client.models()
    thread.join(10)
    odd.close(linger=0)
    context.term()


def test_closing_ends_what_runs(engine: FakeEngine) -> None:
    async def work() -> None:
        client = AsyncClient(engine.endpoint)
        async with client:
            stream = client.stream("tiny", "hang on")
            await anext(stream)
        with pytest.raises(EngineUnreachable, match="closed"):
            await anext(stream)
        assert await asyncio.to_thread(engine.cancelled)

    run(work())


def test_needs_only_pyzmq_and_msgspec() -> None:
    probe = "import engine.client, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    heavy = {"torch", "numpy", "tokenizers", "jinja2", "starlette", "uvicorn", "rich"}
    assert not loaded & {"zoo", "workers", "uvloop", *heavy}
