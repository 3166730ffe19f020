"""The HTTP process: kept alive, on the same port, or refused with its reason."""

import asyncio
import os
import signal
import socket
import sys

import pytest

from engine.config import ConfigError, HttpConfig
from engine.web import Web, WebFailed, check_free
from tests.engine import rig
from tests.engine.fakelaunch import COMMANDS


def config(port: int = 0) -> HttpConfig:
    return HttpConfig(host="127.0.0.1", port=port, endpoint="ipc:///nowhere")


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_killed_process_comes_back_on_the_same_port() -> None:
    async def test() -> None:
        web = Web(config(), COMMANDS.http)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(web.run())
            await web.is_ready.wait()
            url = web.url
            port = int(url.rpartition(":")[2])
            assert web._child is not None
            pid = web._child.pid
            os.kill(pid, signal.SIGKILL)
            await rig.until(lambda: web._child.pid != pid and listens(port))
            assert web.url == url
            await web.stop(5)
            await running
        assert not listens(port)

    rig.run(test())


def test_a_process_that_never_listens_is_a_failure() -> None:
    async def test() -> None:
        web = Web(config(), (sys.executable, "-c", "pass"))
        with pytest.raises(WebFailed):
            await web.run()

    rig.run(test())


def test_an_address_in_use_is_found_early() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be used"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    check_free("127.0.0.1", 0)
    with pytest.raises(ConfigError):
        check_free("no.such.host.invalid", 80)
