"""The HTTP process when things go wrong: bad bodies, refusals, clients that leave, death."""

import json
import socket
import subprocess
import sys
import threading
import time
from typing import get_args

import pytest

from engine import api
from tests.engine.fakeengine import KEY, FakeEngine, spell
from tests.engine.httpserver import HttpServer, Site, serve

STATUS = {
    "invalid": 400,
    "too_long": 400,
    "unauthorized": 401,
    "not_found": 404,
    "failed": 500,
    "overloaded": 503,
    "timeout": 504,
}


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
