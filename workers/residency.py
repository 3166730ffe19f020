"""Loads and frees chains beside the loop: a thread of its own, so that serving goes on meanwhile.

The worker's loop asks (`load`, `evict`) and collects outcomes (`finished`)."""

import queue
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workers.chains import UnservableChain
from workers.holdings import Holdings, NoRoom
from workers.loading import LoadedChain, load
from workers.packer import packer_for, step_back
from workers.weights import LoadFormat, open_weights
from workers.wire import ChainId, Load
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.manifest import ChainDigest, Manifests


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A chain that could not be made resident, and why (one sentence). Where the budget lacked
    `missing` bytes, `freeable` are those that other chains alone hold."""

    chain: ChainId
    reason: str
    missing: int = 0
    freeable: Mapping[ChainId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Eviction:
    """A chain whose weights are gone, and what that freed; `parked` as `evict` was told."""

    chain: ChainId
    freed_bytes: int
    parked: bool


Outcome = LoadedChain | LoadFailure | Eviction


class Residency:
    """Weights on one device, beside the loop; `holdings` is this thread's own."""

    def __init__(self, zoo: Path, holdings: Holdings, load_format: LoadFormat = "auto") -> None:
        self._root = zoo
        self._ops = ops = holdings.ops
        self._weights = open_weights(zoo, load_format, ops.device)
        self._holdings = holdings
        self._packer = packer_for(ops, zoo if load_format == "auto" else None)
        self._chains: dict[ChainId, list[Hashable]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], Outcome] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._pending = 0
        self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether outcomes are still to come, or weights to move."""
        return self._pending > 0 or (self._packer is not None and self._packer.is_moving)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights held."""
        return self._holdings.resident_bytes

    @property
    def recalled(self) -> int:
        """Weights that came back from where they were parked, without their files."""
        return self._holdings.recalled

    def load(self, order: Load) -> None:
        """Make a chain resident; a LoadedChain or LoadFailure will follow."""
        self._pending += 1
        self._jobs.put(lambda: self._load(order))

    def evict(self, chain: ChainId, *, parked: bool = False) -> None:
        """Free what only this chain uses; an Eviction will follow."""
        self._pending += 1
        self._jobs.put(lambda: self._evict(chain, parked))

    def finished(self) -> list[Outcome]:
        """Outcomes since the last call, which must not come while a step runs."""
        if self._packer is not None:
            self._packer.move_in()
        outcomes: list[Outcome] = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        self._pending -= len(outcomes)
        return outcomes

    def stop(self) -> None:
        """End the loader thread; a load under way fails."""
        self._jobs.put(None)
        if self._packer is not None:
            self._packer.close()
        self._thread.join()

    # ---- in the loader thread -------------------------------------------------------------------

    def _serve(self) -> None:
        step_back()
        while (job := self._jobs.get()) is not None:
            self._outcomes.put(job())

    def _load(self, order: Load) -> Outcome:
        try:
            with self._ops.loading():
                manifests = self._manifests(order)
                loaded = load(self._holdings, self._weights, order.chain, manifests, self._packer)
        except NoRoom as error:
            freeable = {c: self._holdings.freed_by(keys) for c, keys in self._chains.items()}
            return LoadFailure(order.chain, _failed(error), error.missing, freeable)
        except (ZooError, UnservableChain, OSError, MemoryError, KeyError) as error:
            return LoadFailure(order.chain, _failed(error))
        self._chains[order.chain] = loaded.keys
        return loaded

    def _evict(self, chain: ChainId, parked: bool) -> Outcome:
        # Nothing that still runs may read memory that the next load takes.
        self._ops.synchronize()
        before = self._holdings.resident_bytes
        with self._ops.loading():
            self._holdings.release(self._chains.pop(chain, []), park=parked)
        return Eviction(chain, before - self._holdings.resident_bytes, parked)

    def _manifests(self, order: Load) -> Manifests:
        catalog = Catalog(self._root)
        try:
            manifest = catalog.chain(ChainDigest(order.digest))
            if (order.first, order.last) != (0, len(manifest.units)):
                raise UnservableChain(
                    f"units {order.first} to {order.last} of {len(manifest.units)} were asked for, "
                    "and this worker serves whole chains"
                )
            return Manifests(
                [(d, catalog.unit(d)) for d in manifest.units],
                [None if d is None else (d, catalog.attachment(d)) for d in manifest.attachments],
                order.context,
            )
        finally:
            catalog.close()


def _failed(error: Exception) -> str:
    return f"the chain cannot be loaded: {error}"
