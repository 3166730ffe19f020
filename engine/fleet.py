"""The worker processes: started, greeted, listened to, restarted when they die or fall silent.

Each start gives a worker a new name, so what a dead one sent late is told apart and dropped. The
fleet knows nothing of chains and requests; it tells its crew (the controller) who came and who was
lost.
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from engine.child import Child
from engine.config import Config
from engine.router import Router
from workers import wire

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "workers")
HEARTBEAT_S = 1.0
# Commands that may wait for one worker, which takes them between two batches.
HIGH_WATER = 65_536
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# Starts in a row that may end without a greeting once the engine has served.
MAX_FAILED_STARTS = 5


class Crew(Protocol):
    """Who is told what happens to workers."""

    def on_report(self, worker: str, report: wire.Report) -> None:
        """A worker said something; its first word is Hello."""
        ...

    def on_lost(self, worker: str, reason: str) -> None:
        """A worker that had greeted is no more."""
        ...


class WorkerFailed(Exception):
    """A worker cannot be started: the engine cannot go on."""


@dataclass(slots=True)
class Slot:
    """The place of one worker; `name` is that of the process now in it."""

    device: str
    index: int
    starts: int = 0
    failed_starts: int = 0
    name: str = ""
    child: Child | None = None
    has_greeted: bool = False
    is_refused: bool = False
    has_served: bool = False
    heard_s: float = 0.0
    loads: int = 0


class Fleet:
    """One worker process for each device. `counts`: restarts, stray messages."""

    def __init__(
        self,
        config: Config,
        devices: Sequence[str],
        directory: Path,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._config = config
        self._command = command
        self._endpoint = f"ipc://{directory}/workers"
        self._router = Router(high_water=HIGH_WATER, max_bytes=wire.MAX_MESSAGE_BYTES)
        self._slots = [Slot(device, index) for index, device in enumerate(devices)]
        self._by_name: dict[str, Slot] = {}
        self._is_stopping = False
        self.counts: Counter[str] = Counter()

    @property
    def size(self) -> int:
        """How many workers there are when all are well."""
        return len(self._slots)

    async def run(self, crew: Crew, zoo: Path) -> None:
        """Keep every slot filled until `stop`. Raises WorkerFailed."""
        self._crew = crew
        self._zoo = zoo
        self._router.bind(self._endpoint)
        self._router.start(self._receive, self._disconnected)
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._keep(slot))

    def send(self, worker: str, command: wire.Command) -> None:
        """Send a command. If it cannot be delivered the worker is as good as lost, and ended."""
        slot = self._by_name.get(worker)
        if slot is None:
            return
        slot.loads += isinstance(command, wire.Load)
        if self._router.send(worker.encode(), wire.encode(command)) != "sent" and slot.child:
            slot.child.kill()

    async def stop(self, patience_s: float) -> None:
        """Let every worker leave in order, then end those that did not."""
        self._is_stopping = True
        children = [slot.child for slot in self._slots if slot.child is not None]
        for name in list(self._by_name):
            self.send(name, wire.Drain())
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(_leave(child, patience_s))
        self._router.close()

    # ---- one slot -------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._is_stopping:
            reason = await self._live(slot)
            if self._is_stopping:
                return
            log.error("worker %s is lost: %s", slot.name, reason)
            if slot.has_greeted:
                slot.failed_starts, pause_s = 0, FIRST_PAUSE_S
                self._crew.on_lost(slot.name, reason)
            else:
                slot.failed_starts += 1
                self._give_up_on(slot, reason)
            self.counts["restarts"] += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _live(self, slot: Slot) -> str:
        """One process from its start to its end; returns what it died of."""
        slot.starts += 1
        slot.name = f"{slot.device}-{slot.index}.{slot.starts}"
        slot.has_greeted, slot.is_refused, slot.loads, slot.heard_s = False, False, 0, _now()
        body = msgspec.json.encode(self._worker_config(slot)).decode()
        # Known before it is started: starting takes a large process so long that a worker may greet
        # before the loop is back here.
        self._by_name[slot.name] = slot
        slot.child = child = None
        try:
            slot.child = child = await Child.spawn([*self._command, body])
            log.info("worker %s started on %s, pid %d", slot.name, slot.device, child.pid)
            if slot.is_refused:
                child.kill()
            while (code := await child.wait(HEARTBEAT_S)) is None:
                silence_s = _now() - slot.heard_s
                if silence_s > self._patience_s(slot):
                    child.kill()
                    await child.wait()
                    return f"it said nothing for {silence_s:.0f} s and was ended"
        finally:
            del self._by_name[slot.name]
            if child is not None:
                child.kill()
        return f"its process ended with status {code}"

    def _give_up_on(self, slot: Slot, reason: str) -> None:
        if not slot.has_served or slot.failed_starts >= MAX_FAILED_STARTS:
            raise WorkerFailed(
                f"a worker for {slot.device} cannot be started, {reason}: see its lines above"
            )

    def _patience_s(self, slot: Slot) -> float:
        busy = slot.loads > 0 or not slot.has_greeted
        return self._config.load_timeout if busy else self._config.worker_timeout

    def _worker_config(self, slot: Slot) -> wire.WorkerConfig:
        config = self._config
        sharing = sum(other.device == slot.device for other in self._slots)
        return wire.WorkerConfig(
            name=slot.name,
            endpoint=self._endpoint,
            zoo=str(self._zoo),
            device=slot.device,
            ops=config.ops,
            attention=config.attention_backend,
            load_format=config.load_format,
            threads=config.threads,
            page=config.block_size,
            kv_bytes=config.kv_cache_memory_bytes,
            dtype=config.dtype,
            kv_dtype=config.kv_cache_dtype,
            weight_bytes=config.weight_memory_bytes,
            weights=config.weights,
            memory_utilization=config.gpu_memory_utilization / sharing,
            max_sequences=config.max_num_seqs,
            max_rows=config.max_num_batched_tokens,
            prefix_cache=config.enable_prefix_caching,
            speculative_tokens=config.num_speculative_tokens,
            heartbeat_s=HEARTBEAT_S,
            log_level=config.log_level,
        )

    # ---- what workers say -----------------------------------------------------------------------

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        slot = self._by_name.get(peer.decode(errors="replace"))
        if slot is None or len(frames) != 1:
            self.counts["stray"] += 1
            return
        report = wire.decode_report(frames[0])
        slot.heard_s = _now()
        if isinstance(report, wire.Hello):
            self._greet(slot, report)
        elif _ends_load(report):
            slot.loads = max(slot.loads - 1, 0)
        if slot.has_greeted:
            self._crew.on_report(slot.name, report)

    def _greet(self, slot: Slot, hello: wire.Hello) -> None:
        if hello.version != wire.WIRE_VERSION or hello.name != slot.name:
            log.error(
                "worker %s is refused: it speaks version %d as %s, this engine %d",
                slot.name,
                hello.version,
                hello.name,
                wire.WIRE_VERSION,
            )
            slot.is_refused = True
            if slot.child is not None:
                slot.child.kill()
            return
        slot.has_greeted = slot.has_served = True

    def _disconnected(self, peer: bytes) -> None:
        slot = self._by_name.get(peer.decode(errors="replace"))
        if slot is not None and slot.child is not None and not self._is_stopping:
            log.warning("worker %s hung up", slot.name)
            slot.child.kill()


def _ends_load(report: wire.Report) -> bool:
    return isinstance(report, wire.Loaded) or (
        isinstance(report, wire.Failed) and report.request < 0
    )


async def _leave(child: Child, patience_s: float) -> None:
    if await child.wait(patience_s) is None:
        await child.stop()


def _now() -> float:
    return asyncio.get_running_loop().time()
