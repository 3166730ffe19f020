"""The HTTP process: `python -m engine.http '<JSON of HttpConfig>'`, started by the engine.

It prints `ready PORT` on stdout when it listens. When its stdin closes, or on SIGTERM, it takes no
more connections, finishes the responses that run, and exits 0.
"""

import asyncio
import signal
import socket
import sys
from types import FrameType

import msgspec
import uvicorn
import uvloop

from engine import logs
from engine.client import AsyncClient
from engine.config import HttpConfig
from engine.http.app import build

_BACKLOG = 2048
# Longer than clients and proxies keep idle connections, so that they close them and not we.
_KEEP_ALIVE_S = 75


class _Stdin(asyncio.Protocol):
    """Asks the server to leave when the engine's end of the pipe closes."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server

    def connection_lost(self, exc: Exception | None) -> None:
        """The pipe is closed."""
        self._server.should_exit = True


def main() -> int:
    """Serve until asked to leave."""
    try:
        config = msgspec.json.decode(sys.argv[1], type=HttpConfig)
    except (IndexError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"engine.http is started by `python -m engine launch`: {error}\n")
        return 2
    logs.configure("http", config.log_level, as_json=config.log_json)
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        sys.stderr.write(f"{config.host}:{config.port} cannot be used: {error.strerror}\n")
        return 2
    # uvicorn stops on these signals and then raises them again; by then all is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass)
    uvloop.run(_serve(config, listener))
    return 0


def _pass(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""


async def _serve(config: HttpConfig, listener: socket.socket) -> None:
    async with AsyncClient(config.endpoint) as client:
        server = uvicorn.Server(
            uvicorn.Config(
                build(client, config.max_body_bytes),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        loop = asyncio.get_running_loop()
        stdin, _ = await loop.connect_read_pipe(lambda: _Stdin(server), sys.stdin)
        sys.stdout.write(f"ready {listener.getsockname()[1]}\n")
        sys.stdout.flush()
        await server.serve(sockets=[listener])
        stdin.close()


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG)


if __name__ == "__main__":
    sys.exit(main())
