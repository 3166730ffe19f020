"""The openai package against the real HTTP process."""

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from engine import api
from tests.engine.fakeengine import FINGERPRINT, KEY, FakeEngine, spell
from tests.engine.httpserver import HttpServer


@pytest.fixture(name="engine", scope="module")
def _engine() -> Iterator[FakeEngine]:
    with FakeEngine(key=KEY) as engine:
        yield engine


@pytest.fixture(name="url", scope="module")
def _url(engine: FakeEngine) -> Iterator[str]:
    with HttpServer(engine.endpoint) as server:
        yield server.url


@pytest.fixture(name="client")
def _client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def test_lists_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "blockllm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_chats(client: OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "say hello there"}],
        logprobs=True,
        top_logprobs=2,
        seed=1,
        max_completion_tokens=8,
    )
    (choice,) = done.choices
    assert choice.message.content == "hello there"
    assert choice.finish_reason == "stop"
    assert done.system_fingerprint == FINGERPRINT
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 2
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [entry.token for entry in choice.logprobs.content] == ["hello", " there"]
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_streams_a_chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "say a b c"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == "a b c"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_completes_token_ids_with_echo(client: OpenAI) -> None:
    done = client.completions.create(
        model="tiny", prompt=[spell("say a"), spell("say b")], echo=True, logprobs=1, max_tokens=1
    )
    assert [choice.text for choice in done.choices] == ["say aa", "say bb"]
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens == [*"say a", "a"]
    assert logprobs.token_logprobs[0] is None


def test_streams_completions(client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="say x y", n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["x y", "x y"]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("reject invalid", openai.BadRequestError),
        ("reject not_found", openai.NotFoundError),
        ("reject too_long", openai.BadRequestError),
        ("reject overloaded", openai.InternalServerError),
        ("reject timeout", openai.InternalServerError),
    ],
)
def test_errors_are_the_ones_of_openai(
    client: OpenAI, prompt: str, kind: type[openai.APIStatusError]
) -> None:
    for stream in (False, True):
        with pytest.raises(kind, match="Rejected as"):
            client.completions.create(model="tiny", prompt=prompt, stream=stream)


def test_failures_within_a_stream_are_raised(client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="break it now", stream=True)
    with pytest.raises(openai.APIError, match="worker died"):
        list(stream)


def test_wrong_keys_are_refused(url: str) -> None:
    wrong = OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_leaving_a_stream_cancels(client: OpenAI, engine: FakeEngine) -> None:
    engine.seen.clear()
    with client.completions.create(model="tiny", prompt="hang on", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "hang"
    assert engine.saw(api.Cancel)
