"""The whole server: real processes, real sockets, checkpoints of several families, real clients."""

import asyncio
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
import uvloop
from openai import NotFoundError, OpenAI

from engine.client import AsyncClient
from engine.errors import ModelNotFound, PromptTooLong
from tests import builders
from tests.system.running import running
from tests.workers.family_zoo import Family, wrong_tokens
from zoo.adding.add import AddOptions, add
from zoo.keeping.remove import remove
from zoo.progress import Quiet


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("serving"), "llama")
    made.lora("lora", rank=4, targets=["q_proj", "v_proj"])
    made.tune("last", ["layers.3."])
    gpt2 = builders.tiny_gpt2(made.root / "gpt2")
    add(made.zoo, "gpt2", str(gpt2), AddOptions(), Quiet())
    return made


@pytest.fixture(scope="module")
def engine(family):
    with running(family.zoo, "--kv-cache-memory-bytes", str(64 << 20)) as launched:
        yield launched


def post(url: str, body: object, raw: bytes | None = None) -> tuple[int, dict]:
    data = raw if raw is not None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_every_variant_answers_with_its_own_tokens(engine, family):
    prompts = [[7 + i, 20, 33 + i, 41] * (i + 1) for i in range(4)]
    names = ["base", "lora", "last"]

    async def ask_all() -> list[tuple[str, list[int], list[int]]]:
        async with AsyncClient(engine.zmq) as client, asyncio.TaskGroup() as group:
            tasks = [
                (name, prompt, group.create_task(
                    client.complete(name, prompt, max_tokens=32, temperature=0, ignore_eos=True)
                ))
                for prompt in prompts
                for name in names
            ]  # fmt: skip
        return [(name, prompt, task.result().token_ids) for name, prompt, task in tasks]

    models = {name: family.reference(name) for name in names}
    for name, prompt, tokens in uvloop.run(ask_all()):
        assert len(tokens) == 32
        assert wrong_tokens(models[name], prompt, tokens)[0] == 0
    assert any(block["merged_runs"] for block in settled_blocks(engine))


def settled_blocks(engine) -> list[dict]:
    engine.settled()
    return engine.status()["blocks"]


def test_the_openai_client_streams_what_it_gets_whole(engine):
    client = OpenAI(base_url=engine.http + "/v1", api_key="none")
    assert {m.id for m in client.models.list()} >= {"base", "lora", "last", "gpt2"}
    for model in ("base", "lora", "gpt2"):
        options = {"model": model, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**options, extra_body={"ignore_eos": True})
        assert whole.usage.completion_tokens == 12
        assert len(whole.system_fingerprint) == 64
        stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        assert "".join(c.choices[0].text for c in stream if c.choices) == whole.choices[0].text
    with pytest.raises(NotFoundError):
        client.completions.create(model="nobody", prompt="x")


def test_equal_seeds_give_equal_samples(engine):
    with engine.client() as client:
        options = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
        first = client.complete("base", [9, 8, 7], seed=5, **options)
        again = client.complete("base", [9, 8, 7], seed=5, **options)
        other = client.complete("base", [9, 8, 7], seed=6, **options)
    assert first.token_ids == again.token_ids != other.token_ids


def test_variants_come_and_go_while_it_serves(engine, family):
    with engine.client() as client:
        path = builders.tiny_lora(family.root / "new", family.base, rank=2, seed=8)
        add(family.zoo, "new", str(path), AddOptions(base="base"), Quiet())
        engine.wait_for("new")
        first = client.complete("new", [5, 6, 7, 8], max_tokens=8, temperature=0)
        other = builders.tiny_lora(family.root / "new2", family.base, rank=6, seed=9)
        add(family.zoo, "new", str(other), AddOptions(base="base", replace=True), Quiet())
        deadline = time.monotonic() + 10
        while (second := client.complete("new", [5, 6, 7, 8], max_tokens=8, temperature=0)) and (
            second.fingerprint == first.fingerprint
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        remove(family.zoo, "new", wait_s=5, progress=Quiet())
        engine.wait_for("new", present=False)
        with pytest.raises(ModelNotFound):
            client.complete("new", [5], max_tokens=1)
        assert client.complete("base", [5], max_tokens=1, temperature=0).token_ids


def test_prefixes_are_shared_between_requests_and_variants(engine):
    prompt = list(range(10, 90))
    with engine.client() as client:
        first = client.complete("base", prompt, max_tokens=2, temperature=0)
        second = client.complete("base", prompt, max_tokens=2, temperature=0)
        before = engine.settled()["counters"]["shared_pages"]
        part = client.complete("last", prompt, max_tokens=2, temperature=0)
    shared = engine.settled()["counters"]["shared_pages"] - before
    # Of a prompt that was seen, its last token alone is computed again.
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 79)
    assert part.usage.cached_tokens == 64
    assert shared == 4 * 3


BAD_BODIES = [
    (b"{", 400), (b"[]", 400), (b"{}", 400), (b"\xff\xfe", 400),
    ({"model": "nobody", "prompt": "x"}, 404),
    ({"model": "base", "prompt": [1] * 300}, 400),
    ({"model": "base", "prompt": [1], "max_tokens": 100000}, 400),
    ({"model": "base", "prompt": [1], "max_tokens": "many"}, 400),
    ({"model": "base", "prompt": [1], "max_tokens": -1}, 400),
    ({"model": "base", "prompt": [1], "temperature": -1}, 400),
    ({"model": "base", "prompt": [1], "top_p": 0}, 400),
    ({"model": "base", "prompt": [1], "top_p": "high"}, 400),
    ({"model": "base", "prompt": [1], "logit_bias": {"99999": 1}}, 400),
    ({"model": "base", "prompt": [1], "n": 0}, 400),
    ({"model": "base", "prompt": [1], "seed": "x"}, 400),
    ({"model": "base", "prompt": [999999]}, 400),
    ({"model": "base", "prompt": [-1]}, 400),
    ({"model": "base", "prompt": []}, 400),
    ({"model": "base", "prompt": {"a": 1}}, 400),
    ({"model": 7, "prompt": [1]}, 400),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BAD_BODIES)
def test_bad_input_is_refused_in_a_sentence_and_the_next_request_served(engine, body, status):
    raw = body if isinstance(body, bytes) else None
    code, answer = post(engine.http + "/v1/completions", body, raw)
    assert code == status, answer
    message = answer["error"]["message"]
    assert 10 < len(message) < 400
    assert "Traceback" not in message
    good = {"model": "base", "prompt": [1, 2], "max_tokens": 2, "temperature": 0}
    assert post(engine.http + "/v1/completions", good)[0] == 200


def test_a_prompt_too_long_says_how_long_it_may_be(engine):
    with engine.client() as client, pytest.raises(PromptTooLong, match="256"):
        client.complete("base", [1] * 300, max_tokens=4)


def test_a_client_that_vanishes_gives_its_pages_back(engine):
    before = engine.settled()

    async def leave() -> None:
        async with AsyncClient(engine.zmq) as client:
            async for chunk in client.stream("base", [3] * 50, max_tokens=200, ignore_eos=True):
                if chunk.index > 3:
                    return

    uvloop.run(leave())
    connection = urllib.request.Request(
        engine.http + "/v1/completions",
        json.dumps({"model": "base", "prompt": [4] * 40, "max_tokens": 200, "stream": True,
                    "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    answer = urllib.request.urlopen(connection, timeout=10)
    answer.readline()
    answer.close()
    after = engine.settled()
    assert after["free_pages"] + after["cached_pages"] == (
        before["free_pages"] + before["cached_pages"]
    )


def test_many_short_requests_leave_nothing_behind(engine):
    before = engine.settled()
    names = ["base", "lora", "last", "gpt2"]
    sent = [0, 0]

    async def client_loop(number: int) -> None:
        async with AsyncClient(engine.zmq) as client:
            for i in range(20):
                count = 1 + (number + i) % 5
                prompt = [5 + (number * 7 + i * 3 + k) % 250 for k in range(3 + i)]
                done = await client.complete(
                    names[(number + i) % 4], prompt, max_tokens=count, ignore_eos=True
                )
                assert len(done.token_ids) == count
                sent[0] += len(prompt)
                sent[1] += count

    async def storm() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(client_loop(number))

    uvloop.run(storm())
    after = engine.settled()
    assert after["counters"]["prompt_tokens"] - before["counters"]["prompt_tokens"] == sent[0]
    assert after["counters"]["output_tokens"] - before["counters"]["output_tokens"] == sent[1]
    assert after["free_pages"] + after["cached_pages"] == after["total_pages"]


def test_a_killed_worker_loses_no_token(family):
    with running(family.zoo, "--kv-cache-memory-bytes", str(64 << 20)) as engine:
        options = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
        with engine.client() as client:
            whole = client.complete("last", [5, 6, 7], **options).token_ids
            tokens: list[int] = []
            for chunk in client.stream("last", [5, 6, 7], **options):
                if not tokens:
                    os.kill(engine.worker()["pid"], signal.SIGKILL)
                tokens.extend(chunk.token_ids)
        assert tokens == whole
        assert engine.stop(signal.SIGINT) == 0


def test_sigterm_drains_what_runs_and_exits_0(family):
    with running(family.zoo, "--kv-cache-memory-bytes", str(64 << 20)) as engine:
        got: list[int] = []

        def ask() -> None:
            with engine.client() as client:
                for chunk in client.stream("base", [9] * 9, max_tokens=200, ignore_eos=True):
                    got.extend(chunk.token_ids)

        asking = threading.Thread(target=ask)
        asking.start()
        while not got:
            time.sleep(0.01)
        assert engine.stop(signal.SIGTERM) == 0
        asking.join(10)
        assert len(got) == 200
        assert not any("Traceback" in line for line in engine.log)
