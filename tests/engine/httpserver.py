"""The real HTTP process, in front of an engine that follows a script."""

import signal
import subprocess
import sys
from typing import Self

import msgspec

from engine.config import HttpConfig


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
