"""The engine's heart: what clients, workers, the catalog and the clock bring goes to who decides.

Everything here runs on one loop and never waits, but for the text work of `intake`, whose result
comes back as one more event.
"""

import asyncio
import logging
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, assert_never

from engine import api
from engine.admission import Admission
from engine.config import Config
from engine.delivery import Delivery
from engine.dispatch import Dispatch
from engine.errors import EngineError, EngineFailed, InvalidRequest, Overloaded
from engine.events import WorkerGreeted, WorkerLost, WorkerReported
from engine.fleet import Fleet
from engine.gateway import Gateway
from engine.gauges import ClusterGauges
from engine.intake import Intake
from engine.keys import ApiKeys
from engine.metrics import Metrics
from engine.provision import Provision
from engine.queries import Queries, Query
from engine.refusal import rejected
from engine.state import Cluster
from engine.text import Texts
from engine.throughput import Throughput
from engine.watch import CatalogWatch
from workers import wire
from workers.wire import RequestId
from zoo.catalog import Catalog
from zoo.store import Store

log = logging.getLogger(__name__)

TICK_S = 0.1
# Ticks from one look at the catalog to the next.
CATALOG_TICKS = 5
DRAIN_RETRY_S = 5.0


class Controller:
    """One engine. `addresses` is what it tells of itself in its status."""

    def __init__(
        self, config: Config, zoo: Path, keys: ApiKeys, gateway: Gateway, fleet: Fleet
    ) -> None:
        self.addresses: dict[str, str] = {"zoo": str(zoo)}
        self.ready = asyncio.Event()
        self._quiet = asyncio.Event()
        self._is_draining = False
        self._started_s = time.monotonic()
        self._gateway = gateway
        self._fleet = fleet
        self._preparing = 0
        self._limit = config.max_num_queued_reqs
        store = Store(zoo)
        self._cluster = Cluster()
        self._catalog = Catalog(zoo)
        self._metrics = Metrics(vllm_names=config.vllm_metrics)
        counts = {"gateway": gateway.counts, "fleet": fleet.counts}
        self._metrics.watch(ClusterGauges(self._cluster, counts))
        self._provision = Provision(config, self._cluster, CatalogWatch(self._catalog), fleet.send)
        self._dispatch = Dispatch(
            self._cluster,
            Admission(self._limit),
            self._metrics,
            fleet.send,
            gateway.reply,
            self._provision.release,
        )
        refresh = self._provision.refresh
        self._intake = Intake(config, keys, Texts(store), self._cluster, refresh)
        self._queries = Queries(self._cluster, self._intake, self._metrics, store, self._about)

    async def run(self) -> None:
        """Serve until cancelled."""
        self._provision.refresh()
        if not self._cluster.variants:
            log.warning("the zoo %s is empty: add variants to it", self.addresses["zoo"])
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._gateway.start(self.on_request, self.on_vanished)
                await self._tick_on()
        finally:
            self._intake.close()
            self._catalog.close()

    async def drain(self, patience_s: float) -> None:
        """Refuse what is new and let the rest end; what has not ended in time is dropped."""
        self._is_draining = True
        self._note_end()
        try:
            async with asyncio.timeout(patience_s):
                await self._quiet.wait()
        except TimeoutError:
            log.warning("%d requests are cut short", len(self._dispatch.ledger))
            self._dispatch.drop_all(_draining())

    @property
    def state(self) -> str:
        """starting, ready, recovering (no worker is left for now) or draining."""
        if self._is_draining:
            return "draining"
        if not self.ready.is_set():
            return "starting"
        return "ready" if self._cluster.workers else "recovering"

    # ---- clients --------------------------------------------------------------------------------

    def on_request(self, client: bytes, request: api.Request) -> None:
        """A client asks for something."""
        match request:
            case api.Submit():
                self._submit(client, request)
            case api.Cancel():
                self._cancel(client, request.id)
            case _:
                self._group.create_task(self._answer(client, request))

    def on_vanished(self, client: bytes) -> None:
        """A client is gone: all that it asked for ends."""
        numbers = self._dispatch.ledger.of(client)
        for number in numbers:
            self._end(number)
        if numbers:
            log.info("a client vanished, its %d requests are cancelled", len(numbers))
            self._after_end()

    def _submit(self, client: bytes, submit: api.Submit) -> None:
        ledger = self._dispatch.ledger
        if ledger.find(client, submit.id) is not None:
            message = f"The id {submit.id} is in use on this connection: choose another one."
            self._refuse(client, submit.id, InvalidRequest(message, "id"))
        elif self._is_draining:
            self._refuse(client, submit.id, _draining())
        elif self._preparing >= self._limit:
            error = Overloaded("Too many requests arrive at once: try again.", retry_after_s=1.0)
            self._refuse(client, submit.id, error)
        else:
            number = self._dispatch.number()
            ledger.add(client, submit.id, number)
            self._preparing += 1
            self._group.create_task(self._prepare(number, client, submit, time.monotonic()))

    async def _prepare(
        self, number: RequestId, client: bytes, submit: api.Submit, arrived_s: float
    ) -> None:
        ledger = self._dispatch.ledger
        try:
            ask = await self._intake.prepare(submit)
            if number in ledger:
                self._dispatch.arrive(number, Delivery(client, submit.id, ask, arrived_s))
        except EngineError as error:
            self._give_up(number, client, submit.id, error)
        except Exception:
            log.exception("request %d on %r failed", number, submit.model[:100])
            self._give_up(number, client, submit.id, _failed())
        finally:
            self._preparing -= 1
            self._note_end()

    def _give_up(self, number: RequestId, client: bytes, name: int, error: EngineError) -> None:
        """Refuse a request that was not queued, unless its client no longer waits for it."""
        if number in self._dispatch.ledger:
            self._dispatch.ledger.remove(number)
            self._refuse(client, name, error)

    def _cancel(self, client: bytes, name: int) -> None:
        number = self._dispatch.ledger.find(client, name)
        if number is None:
            return
        if not self._dispatch.has(number):
            unmade = api.Finished(name, 0, "cancelled", "", 0, 0, 0, "")
            self._gateway.reply(client, unmade)
        self._end(number)
        self._after_end()

    def _end(self, number: RequestId) -> None:
        if self._dispatch.has(number):
            self._dispatch.cancel(number)
        else:
            self._dispatch.ledger.remove(number)

    async def _answer(self, client: bytes, query: Query) -> None:
        try:
            reply = await self._queries.answer(query)
        except EngineError as error:
            reply = rejected(query.id, error)
        except Exception:
            log.exception("a request for %s failed", type(query).__name__)
            reply = rejected(query.id, _failed())
        self._gateway.reply(client, reply)

    def _refuse(self, client: bytes, name: int, error: EngineError) -> None:
        self._metrics.rejected(error.reason)
        self._gateway.reply(client, rejected(name, error))

    # ---- workers --------------------------------------------------------------------------------

    def on_report(self, worker: str, report: wire.Report) -> None:
        """A worker says something."""
        match report:
            case wire.Tokens():
                self._dispatch.advance(report)
                self._note_end()
            case wire.Started():
                self._dispatch.begin(report)
            case wire.Scored():
                self._dispatch.score(report)
            case wire.Status():
                self._cluster.apply(WorkerReported(worker, report))
            case wire.Failed() if report.request >= 0:
                self._dispatch.fail(report.request, report.reason)
                self._note_end()
            case wire.Hello() | wire.Loaded() | wire.Failed() | wire.Evicted():
                self._equip(worker, report)
            case wire.Drained():
                log.info("worker %s has drained", worker)
            case _:
                assert_never(report)

    def on_lost(self, worker: str, reason: str) -> None:
        """A worker died: its requests go on elsewhere."""
        self._dispatch.abandon(worker)
        self._cluster.apply(WorkerLost(worker))
        self._after_end()

    def _equip(
        self, worker: str, report: wire.Hello | wire.Loaded | wire.Failed | wire.Evicted
    ) -> None:
        match report:
            case wire.Hello():
                self._cluster.apply(WorkerGreeted(report))
                self._provision.equip(worker)
            case wire.Loaded():
                self._provision.loaded(worker, report)
            case wire.Failed():
                self._provision.failed(worker, report.chain, report.reason)
                self._dispatch.drop_unserved(report.chain)
            case wire.Evicted():
                self._provision.evicted(worker)
        if len(self._cluster.workers) == self._fleet.size and self._provision.is_settled:
            self.ready.set()
        self._dispatch.pump()

    # ---- time -----------------------------------------------------------------------------------

    async def _tick_on(self) -> None:
        throughput = Throughput(self._metrics, self._cluster, time.monotonic())
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            try:
                self._tick(throughput, looks_at_catalog=ticks % CATALOG_TICKS == 0)
            except Exception:
                log.exception("what is due every %g s failed", TICK_S)

    def _tick(self, throughput: Throughput, *, looks_at_catalog: bool) -> None:
        now = time.monotonic()
        if looks_at_catalog:
            self._provision.refresh()
        self._dispatch.expire(now)
        self._after_end()
        if (line := throughput.line(now)) is not None:
            log.info(line)

    def _after_end(self) -> None:
        self._dispatch.pump()
        self._note_end()

    def _note_end(self) -> None:
        if self._is_draining and not self._dispatch.ledger:
            self._quiet.set()

    def _about(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "ready": self.state == "ready",
            "version": _version(),
            "uptime_s": time.monotonic() - self._started_s,
            **self.addresses,
            "counts": {"fleet": dict(self._fleet.counts), "gateway": dict(self._gateway.counts)},
        }


def _draining() -> Overloaded:
    message = "The engine is draining and takes no more requests: use another one."
    return Overloaded(message, retry_after_s=DRAIN_RETRY_S)


def _failed() -> EngineFailed:
    return EngineFailed("The engine failed to handle this request; its log says why.")


def _version() -> str:
    try:
        return version("blockllm")
    except PackageNotFoundError:
        return "unknown"
