"""Keeps the workers' chains in step with the catalog: what to load, where, and what to evict."""

import logging
from collections.abc import Callable

from engine.config import Config
from engine.events import (
    ChainEvicting,
    ChainFailed,
    ChainLoaded,
    ChainLoading,
    VariantAppeared,
)
from engine.state import Cluster, ServedChain
from engine.watch import CatalogWatch
from workers import wire
from workers.wire import ChainId

log = logging.getLogger(__name__)


class Provision:
    """The controller's hand for everything about chains. Every worker holds every chain."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        watch: CatalogWatch,
        send: Callable[[str, wire.Command], None],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._watch = watch
        self._send = send

    @property
    def is_settled(self) -> bool:
        """Whether every chain is loaded, or has failed, on every worker there is."""
        return all(
            number in worker.holdings and worker.holdings[number].state != "loading"
            for worker in self._cluster.workers.values()
            for number in self._cluster.chains
        )

    def refresh(self) -> None:
        """Take in what changed in the catalog: load what is new, evict what nobody uses."""
        events = self._watch.changes(self._cluster)
        for event in events:
            self._cluster.apply(event)
            if isinstance(event, VariantAppeared):
                log.info("variant %s: chain %s", event.variant.name, event.digest[:12])
                self._load_everywhere(self._cluster.chains[event.chain])
            else:
                log.info("variant %s left the catalog", event.name)
        if events:
            for number in list(self._cluster.chains):
                self.release(number)

    def equip(self, worker: str) -> None:
        """Load every chain on a worker that has just come."""
        for chain in self._cluster.chains.values():
            self._load(worker, chain)

    def release(self, number: ChainId) -> None:
        """Evict a chain if no name and no request needs it."""
        chain = self._cluster.chains[number]
        if chain.names or chain.requests:
            return
        holders = [w.name for w in self._cluster.workers.values() if number in w.holdings]
        self._cluster.apply(ChainEvicting(number))
        for worker in holders:
            self._send(worker, wire.Evict(number))

    def loaded(self, worker: str, loaded: wire.Loaded) -> None:
        """A worker holds a chain; it may have been given up meanwhile."""
        chain = self._cluster.chains.get(loaded.chain)
        if chain is None:
            return
        self._cluster.apply(ChainLoaded(worker, loaded))
        log.info(
            "%s is loaded on %s in %.2f s, %.1f of its %.1f MB moved",
            _names(chain),
            worker,
            loaded.seconds,
            loaded.moved_bytes / 1e6,
            loaded.chain_bytes / 1e6,
        )
        if loaded.weight_error:
            log.info("its weights are off by %.2f %% of their norm", 100 * loaded.weight_error)

    def failed(self, worker: str, number: ChainId, reason: str) -> None:
        """A worker cannot hold a chain."""
        chain = self._cluster.chains.get(number)
        if chain is not None:
            self._cluster.apply(ChainFailed(worker, number, reason))
            log.warning("%s cannot be loaded on %s: %s", _names(chain), worker, reason)

    def evicted(self, worker: str) -> None:
        """A worker has room again: perhaps for what did not fit before."""
        holdings = self._cluster.workers[worker].holdings
        for number in [n for n, holding in holdings.items() if holding.state == "failed"]:
            self._load(worker, self._cluster.chains[number])

    def _load_everywhere(self, chain: ServedChain) -> None:
        for worker in self._cluster.workers.values():
            if chain.number not in worker.holdings:
                self._load(worker.name, chain)

    def _load(self, worker: str, chain: ServedChain) -> None:
        self._cluster.apply(ChainLoading(worker, chain.number))
        context = self._config.served_context(chain.context)
        self._send(worker, wire.Load(chain.number, chain.digest, 0, chain.units, context))


def _names(chain: ServedChain) -> str:
    return ", ".join(sorted(chain.names)) or f"chain {chain.digest[:12]}"
