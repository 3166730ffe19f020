"""An engine with real sockets and processes: requests, refusals, cancels, clients that vanish."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine import api
from engine.errors import (
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    Unauthorized,
)
from tests.engine import rig


def test_streams_every_token_once_and_in_order(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            chunks = [chunk async for chunk in client.stream("base", [65, 66], max_tokens=20)]
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            assert tokens == rig.expected(65, 20)
            assert "".join(chunk.text for chunk in chunks) == rig.text_of(tokens)
            assert [chunk.index for chunk in chunks] == list(range(21))
            assert chunks[-1].finish_reason == "length"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == 2
            assert chunks[-1].usage.completion_tokens == 20
            assert chunks[-1].usage.cached_tokens == 1

    rig.run(test())


def test_stop_string_ends_the_answer_and_closes_it_at_the_worker(zoo: Path) -> None:
    async def test() -> None:
        text = rig.text_of(rig.expected(65, 10))
        async with rig.engine(zoo) as built, rig.client(built) as client:
            whole = await client.complete("base", [65], max_tokens=100, stop=[text[4:6]])
            assert whole.text == text[:4]
            assert (whole.finish_reason, whole.stop) == ("stop", text[4:6])
            assert whole.usage.completion_tokens == 6
            await rig.until(lambda: rig.has_counted(built, "closes", 1))

    rig.run(test())


def test_stop_token_is_counted_and_not_shown(zoo: Path) -> None:
    async def test() -> None:
        tokens = rig.expected(65, 6)
        async with rig.engine(zoo) as built, rig.client(built) as client:
            whole = await client.complete("base", [65], max_tokens=50, stop_token_ids=[tokens[5]])
            assert whole.text == rig.text_of(tokens[:5])
            assert whole.token_ids == tokens
            assert (whole.finish_reason, whole.stop) == ("stop", tokens[5])

    rig.run(test())


def test_scores_a_prompt_without_an_answer(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            whole = await client.complete(
                "base", [65, 66, 67], max_tokens=0, prompt_logprobs=0, logprobs=0
            )
            assert (whole.token_ids, whole.text) == ([], "")
            assert whole.usage.completion_tokens == 0
            assert whole.prompt_logprobs is not None
            assert [score is None for score in whole.prompt_logprobs] == [True, False, False]

    rig.run(test())


@pytest.mark.parametrize(
    ("options", "prompt", "error", "param"),
    [
        ({"temperature": -1.0}, "hi", InvalidRequest, "temperature"),
        ({"top_p": 0.0}, "hi", InvalidRequest, "top_p"),
        ({"stop_token_ids": [1000]}, "hi", InvalidRequest, "stop_token_ids"),
        ({}, "", InvalidRequest, "prompt"),
        ({}, [5, 257], InvalidRequest, "prompt"),
        ({"max_tokens": 300}, "hi", PromptTooLong, "max_tokens"),
        ({}, [1] * 256, PromptTooLong, "prompt"),
    ],
)
def test_wrong_requests_get_a_sentence_and_the_next_one_is_served(
    zoo: Path, options: dict[str, Any], prompt: str | list[int], error: type[Exception], param: str
) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            with pytest.raises(error) as caught:
                await client.complete("base", prompt, **options)
            assert caught.value.param == param
            assert str(caught.value).endswith(".")
            assert (await client.complete("base", "hi", max_tokens=3)).finish_reason == "length"

    rig.run(test())


def test_unknown_model_is_refused(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            with pytest.raises(ModelNotFound, match="'nobody' does not exist"):
                await client.complete("nobody", "hi")

    rig.run(test())


def test_cancel_ends_an_answer_and_frees_the_worker(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            async for chunk in client.stream("base", "hello", max_tokens=200):
                if chunk.index >= 3:
                    break
            await rig.until(lambda: rig.has_counted(built, "closes", 1))
            status = await client.status()
            assert status["requests"] == {"running": 0, "waiting": 0}

    rig.run(test())


def test_everything_of_a_client_that_vanishes_ends(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built:
            async with rig.client(built) as client:
                streams = [client.stream("base", [65 + i], max_tokens=200) for i in range(4)]
                for stream in streams:
                    await anext(stream)
                # The socket goes without a word: nothing is cancelled first.
                client._line._takers.clear()
            await rig.until(lambda: rig.has_counted(built, "closes", 4))

    rig.run(test())


def test_keys_are_asked_for_and_tenants_do_not_share_pages(zoo: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-a alice\nsecret-b bob # and a comment\n")

    async def test() -> None:
        async with rig.engine(zoo, api_keys=str(keys)) as built:
            for wrong in (None, "secret-c"):
                async with rig.client(built, wrong) as stranger:
                    with pytest.raises(Unauthorized):
                        await stranger.complete("base", "hi")
                    with pytest.raises(Unauthorized):
                        await stranger.models()
            async with rig.client(built) as probe:
                assert set(await probe.status()) == {"state", "ready", "version"}
            async with rig.client(built, "secret-a") as alice:
                assert (await alice.complete("base", "hi", max_tokens=1)).finish_reason == "length"

    rig.run(test())


def test_a_drain_lets_requests_end_and_refuses_new_ones(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.01)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            running = client.stream("base", [65], max_tokens=50)
            await anext(running)
            async with asyncio.TaskGroup() as group:
                group.create_task(built.controller.drain(10))
                await asyncio.sleep(0)
                assert (await client.status())["state"] == "draining"
                with pytest.raises(Overloaded, match="draining"):
                    await client.complete("base", [65])
                rest = [chunk async for chunk in running]
                assert rest[-1].finish_reason == "length"

    rig.run(test())


def test_a_drain_cuts_short_what_takes_too_long(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.script(monkeypatch, interval_s=0.05)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            running = client.stream("base", [65], max_tokens=200)
            await anext(running)
            await built.controller.drain(0.1)
            with pytest.raises(Overloaded):
                async for _ in running:
                    pass

    rig.run(test())


def test_an_id_in_use_is_refused_and_an_ended_one_is_free(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.02)

    async def test() -> None:
        async with rig.engine(zoo) as built:
            with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
                socket.linger = 0
                socket.connect(built.controller.addresses["zmq"])
                line = RawLine(socket)
                submit = api.Submit(1, "base", [65], sampling=api.Sampling(max_tokens=100))
                await line.send(submit)
                assert isinstance(await line.reply(), api.Accepted)
                await line.send(submit)
                while not isinstance(refused := await line.reply(), api.Rejected):
                    pass
                assert (refused.reason, refused.param) == ("invalid", "id")
                await line.send(api.Cancel(1))
                while not isinstance(ended := await line.reply(), api.Finished):
                    pass
                assert ended.reason == "cancelled"
                await line.send(api.Cancel(1))
                # Cancelled before its prompt is even read: the answer is the same.
                await line.send(submit)
                await line.send(api.Cancel(1))
                while not isinstance(ended := await line.reply(), api.Finished):
                    pass
                assert (ended.reason, ended.completion_tokens) == ("cancelled", 0)

    rig.run(test())


class RawLine:
    """A client that does what no library of ours would do."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    async def send(self, request: api.Request) -> None:
        self._socket.send_multipart([api.PROTOCOL, api.encode(request)])

    async def reply(self) -> api.Reply:
        await rig.until(lambda: self._socket.poll(0) != 0)
        return api.decode_reply(self._socket.recv_multipart()[1])
