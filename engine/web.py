"""The HTTP process, a client of the engine like any other: started and kept alive."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Sequence

import msgspec

from engine.child import Child
from engine.config import ConfigError, HttpConfig

log = logging.getLogger(__name__)

HTTP_COMMAND = (sys.executable, "-m", "engine.http")
READY = "ready "
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class WebFailed(Exception):
    """The HTTP process cannot be started."""


class Web:
    """One HTTP process; `is_ready` is set once it listens, on `port`."""

    def __init__(self, config: HttpConfig, command: Sequence[str] = HTTP_COMMAND) -> None:
        self.is_ready = asyncio.Event()
        self._config = config
        self._command = command
        self._child: Child | None = None
        self._is_stopping = False

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"http://{host}:{self._config.port}"

    async def run(self) -> None:
        """Keep the process alive until `stop`. Raises WebFailed if it cannot listen at first."""
        pause_s = FIRST_PAUSE_S
        while True:
            if await self._serve():
                pause_s = FIRST_PAUSE_S
            if self._is_stopping:
                return
            if not self.is_ready.is_set():
                raise WebFailed("the HTTP process cannot be started: see its lines above")
            log.error("the HTTP process is lost and starts anew in %.1f s", pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def stop(self, patience_s: float) -> None:
        """Let it finish its responses, then end it."""
        self._is_stopping = True
        if self._child is not None:
            await self._child.stop(patience_s)

    async def _serve(self) -> bool:
        """One process from its start to its end; whether it came to listen."""
        body = msgspec.json.encode(self._config).decode()
        self._child = child = await Child.spawn([*self._command, body], talks=True)
        listened = False
        try:
            while line := await child.line():
                if line.startswith(READY):
                    # A port that the system chose is kept over restarts.
                    port = int(line.removeprefix(READY))
                    self._config = msgspec.structs.replace(self._config, port=port)
                    listened = True
                    self.is_ready.set()
            await child.wait()
        finally:
            child.kill()
        return listened


def check_free(host: str, port: int) -> None:
    """Raise ConfigError if HOST:PORT cannot be bound, before anything slow begins."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"the HTTP address {host}:{port} cannot be used ({reason}): stop what uses it or "
            "choose another one with --http"
        ) from error
