"""`launch`: puts the engine's parts together, starts them, serves, drains, stops."""

import asyncio
import contextlib
import logging
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from engine import logs
from engine.config import Config, ConfigError, HttpConfig, unknown_variables
from engine.controller import Controller
from engine.devices import devices, threads
from engine.exactness import warning
from engine.fleet import WORKER_COMMAND, Fleet, WorkerFailed
from engine.gateway import Gateway
from engine.keys import read_keys
from engine.samples import Samples, read_samples, show
from engine.web import HTTP_COMMAND, Web, WebFailed, check_free
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.home import zoo_path

log = logging.getLogger(__name__)

# Wrappers such as `timeout` pass a signal on twice: that is not a person who insists.
ECHO_S = 0.5
# What children get for their last words once nothing runs any more.
FAREWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Commands:
    """How the child processes are started; each gets its configuration as one more argument."""

    worker: Sequence[str] = WORKER_COMMAND
    http: Sequence[str] = HTTP_COMMAND


class Forced(Exception):
    """The user asked a second time: no more waiting."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of a running engine."""

    config: Config
    zoo: Path
    controller: Controller
    gateway: Gateway
    fleet: Fleet
    web: Web | None
    samples: Samples

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain and end every child."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in self._work()]
            await stop.wait()
            log.info("draining")
            await self.controller.drain(self.config.shutdown_timeout)
            if self.web is not None:
                await self.web.stop(FAREWELL_S)
            await self.fleet.stop(FAREWELL_S)
            for task in tasks:
                task.cancel()
        self.gateway.close()

    def _work(self) -> Iterator[Coroutine[None, None, None]]:
        yield self.controller.run()
        yield self.fleet.run(self.controller, self.zoo)
        if self.web is not None:
            yield self.web.run()
        yield self._announce()

    async def _announce(self) -> None:
        """The one line on stdout, once requests can be served."""
        addresses = self.controller.addresses
        await self.controller.ready.wait()
        if self.web is not None:
            await self.web.is_ready.wait()
            addresses["http"] = self.web.url
        if self.samples:
            await show(addresses["zmq"], self.samples)
        names = [
            f"{name.upper()} {addresses[name]}" for name in ("http", "zmq") if name in addresses
        ]
        sys.stdout.write(f"BlockLLM is ready: {'  '.join(names)}\n")
        sys.stdout.flush()


def launch(config: Config, environ: Mapping[str, str], commands: Commands | None = None) -> int:
    """Serve until a signal; returns the exit status. Raises ConfigError."""
    logs.configure("engine", config.log_level, as_json=config.log_json)
    for name in unknown_variables(environ):
        log.warning("the variable %s is not known and has no effect", name)
    if approximate := warning(config):
        log.warning("%s", approximate)
    code = 0
    with _private_folder() as folder:
        try:
            uvloop.run(_serve(config, folder, commands or Commands()))
        except* (WorkerFailed, WebFailed) as failures:
            code = 1
            for failure in _leaves(failures):
                log.error("%s", failure)
        except* Forced:
            code = 1
            log.warning("stopped without waiting for what ran")
    log.info("stopped")
    return code


async def _serve(config: Config, folder: Path, commands: Commands) -> None:
    engine = build(config, folder, commands)
    asked, forced = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    patient_until_s = math.inf

    def on_signal() -> None:
        nonlocal patient_until_s
        if not asked.is_set():
            patient_until_s = loop.time() + ECHO_S
            asked.set()
        elif loop.time() > patient_until_s:
            forced.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    async with asyncio.TaskGroup() as group:
        insistence = group.create_task(_insist(forced))
        await engine.run(asked)
        insistence.cancel()


def build(config: Config, folder: Path, commands: Commands) -> Engine:
    """The parts of an engine, its addresses bound, nothing started. Raises ConfigError.

    `folder` is for sockets that only this user may reach."""
    keys = read_keys(config.api_keys)
    zoo = zoo_path(config.zoo)
    _check_weights(config, zoo)
    names = devices(config)
    address = config.http_address
    if address is not None:
        check_free(*address)
    gateway = Gateway()
    endpoint = gateway.bind(config.zmq)
    private = gateway.bind(f"ipc://{folder}/clients")
    config = msgspec.structs.replace(config, threads=threads(config, len(names)))
    fleet = Fleet(config, names, folder, commands.worker)
    controller = Controller(config, zoo, keys, gateway, fleet)
    controller.addresses["zmq"] = endpoint
    web = None
    if address is not None:
        http = HttpConfig(
            host=address[0],
            port=address[1],
            endpoint=private,
            log_level=config.log_level,
            log_json=config.log_json,
        )
        web = Web(http, commands.http)
    samples = read_samples(config.samples) if config.samples else {}
    return Engine(config, zoo, controller, gateway, fleet, web, samples)


def _check_weights(config: Config, zoo: Path) -> None:
    """Random weights are served only to who asked for them, and said to be."""
    if config.load_format == "dummy":
        log.warning("all weights are random: the answers mean nothing (--load-format dummy)")
        return
    with contextlib.closing(Catalog(zoo)) as catalog, contextlib.suppress(ZooError):
        for variant in catalog.served():
            if variant.dummy:
                raise ConfigError(
                    f"{variant.name} in {zoo} has shapes and no weights: launch with "
                    "--load-format dummy"
                )


async def _insist(forced: asyncio.Event) -> None:
    await forced.wait()
    raise Forced


@contextlib.contextmanager
def _private_folder() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="blockllm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
