"""The real HTTP process, in front of an engine that follows a script."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Self

import httpx
import msgspec

from engine.config import HttpConfig
from tests.engine.fakeengine import FakeEngine


class HttpServer:
    """`python -m engine.http` while it is entered; `url` is where it listens."""

    def __init__(self, endpoint: str, max_body_bytes: int = 8 << 20) -> None:
        config = HttpConfig(
            host="127.0.0.1", port=0, endpoint=endpoint, max_body_bytes=max_body_bytes
        )
        self._config = msgspec.json.encode(config).decode()
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.http", self._config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        word, port = self._process.stdout.readline().split()
        assert word == b"ready"
        self.url = f"http://127.0.0.1:{int(port)}"
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def leave(self) -> int:
        """Close its stdin and wait for its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            return self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def has_left_within(self, seconds: float) -> bool:
        """Whether it ends so soon."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait(20)


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
