"""The HTTP process with plain HTTP: status codes, streams, errors, clients that leave."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest

from engine import api
from tests.engine.fakeengine import CONTEXT, FINGERPRINT, KEY, FakeEngine, spell
from tests.engine.httpserver import HttpServer

STATUS = {
    "invalid": 400,
    "too_long": 400,
    "unauthorized": 401,
    "not_found": 404,
    "failed": 500,
    "overloaded": 503,
    "timeout": 504,
}


class Site:
    """A server, its engine and a client for it."""

    def __init__(self, engine: FakeEngine, server: HttpServer) -> None:
        self.engine = engine
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=20, trust_env=False)

    def complete(self, **body: object) -> httpx.Response:
        """POST /v1/completions."""
        return self.http.post("/v1/completions", json={"model": "tiny", **body})

    def chat(self, content: object, **body: object) -> httpx.Response:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": content}]
        return self.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": messages, **body}
        )

    def events(self, path: str, **body: object) -> list[Any]:
        """The events of a stream; the last is [DONE] or an error."""
        body = {"model": "tiny", "stream": True, **body}
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            text = "".join(response.iter_text())
        events = text.split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        payloads = [event.removeprefix("data: ") for event in events]
        return [item if item == "[DONE]" else json.loads(item) for item in payloads]


@contextlib.contextmanager
def serve(key: str = "", max_body_bytes: int = 8 << 20) -> Iterator[Site]:
    """A site of its own."""
    with FakeEngine(key=key) as engine, HttpServer(engine.endpoint, max_body_bytes) as server:
        site = Site(engine, server)
        with site.http:
            yield site


@pytest.fixture(name="shared", scope="module")
def _shared() -> Iterator[Site]:
    with serve() as site:
        yield site


@pytest.fixture(name="site")
def _site(shared: Site) -> Site:
    shared.engine.seen.clear()
    shared.engine.state = "ready"
    return shared


def ask(text: str) -> list[dict[str, str]]:
    """One user message."""
    return [{"role": "user", "content": text}]


def test_completes(site: Site) -> None:
    response = site.complete(prompt="say one two", max_tokens=5)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["system_fingerprint"] == FINGERPRINT
    assert body["choices"] == [
        {
            "index": 0,
            "text": "one two",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_answers_a_chat(site: Site) -> None:
    body = site.chat("say hello", max_completion_tokens=3, n=2, seed=7).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["message"] == {
        "content": "hello",
        "role": "assistant",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 9
    assert body["usage"]["completion_tokens"] == 2
    submits = site.engine.submits()
    assert [submit.sampling.seed for submit in submits] == [7, 8]
    assert {submit.sampling.max_tokens for submit in submits} == {3}


def test_streams_a_completion(site: Site) -> None:
    *pieces, done = site.events("/v1/completions", prompt="say one two three")
    assert done == "[DONE]"
    assert [piece["choices"][0]["text"] for piece in pieces] == ["one", " two", " three", ""]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert "usage" not in pieces[0]
    assert len({piece["id"] for piece in pieces}) == 1


def test_streams_a_chat(site: Site) -> None:
    *pieces, usage, done = site.events(
        "/v1/chat/completions",
        messages=ask("say one two"),
        stream_options={"include_usage": True},
    )
    assert done == "[DONE]"
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas == [
        {"content": "", "role": "assistant"},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert all(piece["usage"] is None for piece in pieces)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 13


def test_counts_tokens_along_the_stream(site: Site) -> None:
    *pieces, _, _ = site.events(
        "/v1/completions",
        prompt="say a b",
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [1, 2, 2]
    assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {7}


def test_streams_several_choices_at_once(site: Site) -> None:
    *pieces, done = site.events("/v1/completions", prompt=["say a b", "say x y"], n=2)
    assert done == "[DONE]"
    texts = dict.fromkeys(range(4), "")
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "a b", 1: "a b", 2: "x y", 3: "x y"}


@pytest.mark.parametrize(
    ("prompt", "submitted"),
    [
        ("say a", ["say a"]),
        (["say a", "say b"], ["say a", "say b"]),
        (spell("say a"), [spell("say a")]),
        ([spell("say a"), spell("say b")], [spell("say a"), spell("say b")]),
    ],
)
def test_takes_every_kind_of_prompt(site: Site, prompt: object, submitted: list[object]) -> None:
    body = site.complete(prompt=prompt).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "b"][: len(submitted)]
    assert [submit.prompt for submit in site.engine.submits()] == submitted
    assert site.engine.submits()[0].sampling.max_tokens == 16


def test_takes_text_parts(site: Site) -> None:
    parts = [{"type": "text", "text": "say hello"}]
    site.chat(parts)
    assert site.engine.submits()[0].messages == [{"role": "user", "content": parts}]


def test_hands_on_every_sampling_field(site: Site) -> None:
    fields = {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 42,
        "stop": ["x", "y"],
        "stop_token_ids": [1],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "logit_bias": {"17": 1.5},
        "allowed_token_ids": [1, 2],
        "skip_special_tokens": False,
        "deadline_s": 9,
    }
    assert set(fields) == set(api.Sampling.__struct_fields__)
    extras = {"priority": -3, "user": "me", "cache_salt": "s", "unheard_of": 1}
    assert site.complete(prompt="say a", add_special_tokens=False, **fields, **extras).is_success
    (submit,) = site.engine.submits()
    sampling = {name: getattr(submit.sampling, name) for name in fields}
    assert sampling == fields | {
        "stop": ("x", "y"),
        "stop_token_ids": (1,),
        "allowed_token_ids": (1, 2),
        "logit_bias": {17: 1.5},
    }
    assert (submit.priority, submit.add_special_tokens) == (-3, False)


def test_nulls_mean_the_default(site: Site) -> None:
    assert site.complete(prompt="say a", temperature=None, stop=None, n=None, seed=None).is_success
    assert site.engine.submits()[0].sampling == api.Sampling(max_tokens=16)


def test_hands_on_template_variables(site: Site) -> None:
    site.chat("say a", chat_template_kwargs={"think": False}, add_generation_prompt=False)
    assert site.engine.submits()[0].template == {"think": False, "add_generation_prompt": False}


def test_shows_logprobs_of_a_completion(site: Site) -> None:
    body = site.complete(prompt="say one two", logprobs=1).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"one": -0.5, "t0": -1.0}, {" two": -0.5, "t0": -1.0}],
        "text_offset": [0, 3],
    }
    *pieces, _ = site.events("/v1/completions", prompt="say one two", logprobs=0)
    assert pieces[1]["choices"][0]["logprobs"] == {
        "tokens": [" two"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" two": -0.5}],
        "text_offset": [3],
    }


@pytest.mark.parametrize("prompt", ["say one", spell("say one")])
def test_echoes_the_prompt_with_its_logprobs(site: Site, prompt: object) -> None:
    choice = site.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "say oneone"
    assert logprobs["tokens"] == [*"say one", "one"]
    assert logprobs["token_logprobs"][:2] == [None, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"a": -0.5, "t0": -1.0}]
    assert logprobs["text_offset"] == list(range(8))
    *pieces, _ = site.events("/v1/completions", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert pieces[0]["choices"][0]["text"] == "say oneone"
    assert pieces[0]["choices"][0]["logprobs"] == logprobs


def test_looks_at_a_prompt_only(site: Site) -> None:
    site.complete(prompt="say one", echo=True, max_tokens=0)
    sampling = site.engine.submits()[0].sampling
    assert (sampling.max_tokens, sampling.prompt_logprobs) == (0, 0)


def test_shows_logprobs_of_a_chat(site: Site) -> None:
    choice = site.chat("say é", logprobs=True, top_logprobs=1).json()["choices"][0]
    top = {"token": "t0", "logprob": -1.0, "bytes": [116, 48]}
    entry = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [top]}
    assert choice["logprobs"] == {"content": [entry]}
    pieces = site.events("/v1/chat/completions", messages=ask("say é"), logprobs=True)
    bare = entry | {"top_logprobs": []}
    assert pieces[1]["choices"][0]["logprobs"] == {"content": [bare]}


def test_shows_token_ids_and_prompt_logprobs(site: Site) -> None:
    choice = site.complete(prompt="hi", return_token_ids=True, prompt_logprobs=1).json()["choices"][
        0
    ]
    assert choice["token_ids"] == [10]
    assert choice["prompt_token_ids"] == [104, 105]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "t0"},
        },
    ]
    body = site.chat("hi", return_token_ids=True).json()
    assert body["prompt_token_ids"] == [104, 105]
    assert body["choices"][0]["token_ids"] == [10]


def test_lists_models(site: Site) -> None:
    body = site.http.get("/v1/models").json()
    (model,) = body["data"]
    assert body["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
    assert model["blockllm"]["fingerprint"] == FINGERPRINT
    assert site.http.get("/v1/models/tiny").json() == model
    missing = site.http.get("/v1/models/org/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_tokenizes_and_back(site: Site) -> None:
    body = site.http.post("/tokenize", json={"model": "tiny", "prompt": "ab"}).json()
    assert body == {"count": 2, "max_model_len": CONTEXT, "tokens": [97, 98]}
    body = site.http.post("/tokenize", json={"model": "tiny", "messages": ask("ab")}).json()
    assert body["tokens"] == [97, 98]
    body = site.http.post("/detokenize", json={"model": "tiny", "tokens": [97, 98]}).json()
    assert body == {"prompt": "ab"}
    assert site.http.post("/tokenize", json={"model": "tiny"}).status_code == 400


def test_tells_of_itself(site: Site) -> None:
    metrics = site.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "up 1" in metrics.text
    assert site.http.head("/metrics").status_code == 200
    assert site.http.get("/version").json() == {"version": "1.2.3"}
    assert site.http.get("/status").json()["state"] == "ready"
    assert "<html" in site.http.get("/").text


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("ready", 200, 200), ("draining", 200, 503), ("starting", 503, 503), ("recovering", 503, 503)],
)
def test_says_how_it_is(site: Site, state: str, health: int, ready: int) -> None:
    site.engine.state = state
    assert site.http.get("/health").status_code == health
    assert site.http.get("/ping").status_code == health
    assert site.http.get("/ready").status_code == ready
    if health == 200:
        assert site.http.get("/health").content == b""
    else:
        assert int(site.http.get("/health").headers["retry-after"]) >= 1


def test_repeats_request_ids(site: Site) -> None:
    for path in ("/health", "/nowhere"):
        assert site.http.get(path, headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert site.http.get("/health").headers["x-request-id"]


@pytest.mark.parametrize("reason", get_args(api.Reason))
@pytest.mark.parametrize("stream", [False, True])
def test_every_refusal_has_its_status(site: Site, reason: str, stream: bool) -> None:
    response = site.complete(prompt=f"reject {reason}", stream=stream)
    error = response.json()["error"]
    assert response.status_code == STATUS[reason]
    assert error["message"] == f"Rejected as {reason}."
    assert set(error) == {"message", "type", "param", "code"}
    if response.status_code == 503:
        assert response.headers["retry-after"] == "2"
    if response.status_code == 401:
        assert response.headers["www-authenticate"] == "Bearer"


def test_unknown_models_are_not_found(site: Site) -> None:
    response = site.complete(prompt="say a", model="none")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "There is no model none.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_a_failure_within_a_stream_is_its_last_event(site: Site) -> None:
    *pieces, error = site.events("/v1/completions", prompt="break it now please")
    assert [piece["choices"][0]["text"] for piece in pieces] == ["break", " it"]
    assert error["error"]["message"] == "A worker died."
    assert site.complete(prompt="break it now please").status_code == 500


BAD = [
    # body, field, words, and the path if it is not that of completions
    (b"", None, "not valid JSON"),
    (b"{", None, "not valid JSON"),
    (b"\xff\xfe", None, "not valid JSON"),
    (b'"text"', None, "Expected `object`"),
    (b"[1]", None, "Expected `object`"),
    (b"[" * 100_000, None, ""),
    (b'{"prompt": "x"}', "model", "missing required field"),
    (b'{"model": "tiny"}', "prompt", "missing required field"),
    (b'{"model": 1, "prompt": "x"}', "model", "Expected `str`"),
    (b'{"model": "tiny", "prompt": 7}', "prompt", "Expected"),
    (b'{"model": "tiny", "prompt": []}', "prompt", "prompt must be"),
    (b'{"model": "tiny", "prompt": ["a", 1]}', "prompt", "prompt must be"),
    (b'{"model": "tiny", "prompt": [[-1]]}', "prompt[0][0]", ">= 0"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', None, ""),
    (b'{"model": "tiny", "prompt": "x", "max_tokens": "many"}', "max_tokens", "Expected `int"),
    (b'{"model": "tiny", "prompt": "x", "max_tokens": -1}', "max_tokens", ">= 0"),
    (b'{"model": "tiny", "prompt": "x", "temperature": -0.5}', "temperature", ">= 0"),
    (b'{"model": "tiny", "prompt": "x", "top_p": 0}', "top_p", "> 0"),
    (b'{"model": "tiny", "prompt": "x", "n": 0}', "n", ">= 1"),
    (b'{"model": "tiny", "prompt": "x", "n": 1000}', "n", "<= 128"),
    (b'{"model": "tiny", "prompt": "x", "stop": [1]}', "stop[0]", "Expected `str`"),
    (b'{"model": "tiny", "prompt": "x", "stream": "yes"}', "stream", "Expected `bool"),
    (b'{"model": "tiny", "prompt": "x", "logit_bias": {"a": 1}}', "logit_bias", "Expected `int`"),
    (b'{"model": "tiny", "prompt": "x", "seed": 1e400}', "seed", ""),
    (b'{"model": "tiny", "prompt": "x", "seed": 99999999999999999999}', "seed", ""),
    (b'{"model": "tiny", "prompt": "x", "best_of": 3}', "best_of", "has no best_of"),
    (b'{"model": "tiny", "prompt": "x", "suffix": "y"}', "suffix", "insertion"),
    (b'{"model": "tiny", "messages": []}', "messages", "length >= 1"),
    (b'{"model": "tiny", "messages": "x"}', "messages", "Expected `array`"),
    (b'{"model": "tiny", "messages": [{}], "tools": [{}]}', "tools", "tool calling"),
    (
        b'{"model": "tiny", "messages": [{}], "response_format": {"type": "json_schema"}}',
        "response_format",
        "other than text",
    ),
    (b'{"model": "tiny", "messages": [{}], "top_logprobs": 2}', "top_logprobs", "needs logprobs"),
    (
        b'{"model": "tiny", "messages": [{"a": ' + b"[" * 50 + b"]" * 50 + b"}]}",
        "messages",
        "too deeply",
    ),
]


@pytest.mark.parametrize(("body", "field", "words"), BAD)
def test_bad_bodies_are_named(site: Site, body: bytes, field: str | None, words: str) -> None:
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    response = site.http.post(path, content=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert words in error["message"]
    assert error["param"] == field
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    assert not site.engine.submits()
    assert site.complete(prompt="say fine").json()["choices"][0]["text"] == "fine"


def test_large_bodies_are_refused() -> None:
    with serve(max_body_bytes=1000) as site:
        response = site.complete(prompt="x" * 2000)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert site.complete(prompt="say fine").is_success


def test_unknown_paths_and_methods(site: Site) -> None:
    missing = site.http.get("/v2/anything")
    assert missing.status_code == 404
    assert "no path /v2/anything" in missing.json()["error"]["message"]
    wrong = site.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert "POST" in wrong.headers["allow"]


def test_keys_are_passed_on() -> None:
    with serve(key=KEY) as site:
        assert site.complete(prompt="say a").status_code == 401
        assert site.http.get("/v1/models").status_code == 401
        site.http.headers["Authorization"] = f"Bearer {KEY}"
        assert site.complete(prompt="say a").is_success
        assert site.complete(prompt=spell("say a"), echo=True).is_success
        assert site.http.get("/v1/models").is_success
        del site.http.headers["Authorization"]
        assert site.http.get("/health").is_success
        assert site.http.get("/metrics").is_success


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_cancels(site: Site, stream: bool, n: int) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hang on", "stream": stream, "n": n}).encode()
    host, port = site.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        assert site.engine.saw(api.Submit, count=n)
    assert site.engine.saw(api.Cancel, count=n)
    cancelled = {one.id for one in site.engine.seen if isinstance(one, api.Cancel)}
    assert cancelled == {submit.id for submit in site.engine.submits()}


def test_many_streams_at_once(site: Site) -> None:
    def work(number: int) -> None:
        for _ in range(5):
            *pieces, _ = site.events("/v1/completions", prompt=f"say answer {number}")
            texts.append((number, "".join(piece["choices"][0]["text"] for piece in pieces)))

    texts: list[tuple[int, str]] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == 80
    assert all(text == f"answer {number}" for number, text in texts)


def test_the_death_of_the_engine_is_told() -> None:
    with FakeEngine() as engine, HttpServer(engine.endpoint) as server:
        site = Site(engine, server)
        threading.Timer(0.3, engine.die).start()
        *_, error = site.events("/v1/completions", prompt="hang on")
        assert error["error"]["code"] == "engine_unreachable"
        started = time.monotonic()
        health = site.http.get("/health")
        assert health.status_code == 503
        assert time.monotonic() - started < 8
        site.http.close()


def test_sigterm_lets_streams_finish() -> None:
    with serve() as site:
        body = {"model": "tiny", "prompt": "hang on", "stream": True}
        with site.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "hang" in next(lines)
            site.server.terminate()
            assert not site.server.has_left_within(0.5)
        assert site.engine.cancelled()
        assert site.server.wait() == 0


def test_leaves_when_its_stdin_closes() -> None:
    with serve() as site:
        site.http.get("/health")
        assert site.server.leave() == 0


def test_wrong_starts_exit_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = f'{{"host": "127.0.0.1", "port": {port}, "endpoint": "tcp://127.0.0.1:9"}}'
        for arguments in ([], ["{"], [config]):
            done = subprocess.run(
                [sys.executable, "-m", "engine.http", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1
            assert not done.stdout


def test_every_path_is_documented(site: Site) -> None:
    document = site.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        wrong = "get" if "post" in operations else "post"
        url = path.replace("{name}", "tiny")
        assert site.http.request(wrong, url).status_code == 405
    schema = document["components"]["schemas"]["CompletionRequest"]
    assert set(schema["required"]) == {"model", "prompt"}
