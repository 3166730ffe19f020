"""Which chains of a worker are ready: has them loaded, parks and forgets them.

The engine orders every chain to every worker. Where the weight budget cannot hold them all, those
that nobody uses give way, least recently used first (they are parked: still served, and loaded
again when a request asks). Between the worker's loop and the loader thread of
`workers.residency`."""

from collections.abc import Callable, Iterable, Mapping

from workers import wire
from workers.chains import Chains, ServedChain
from workers.loading import LoadedChain
from workers.residency import Eviction, LoadFailure, Residency
from workers.runner import Runner
from workers.wire import ChainId

Waiting = tuple[wire.Open, wire.Prompt]


def victims(needed: int, freeable: Mapping[ChainId, int], idle: Iterable[ChainId]) -> list[ChainId]:
    """Chains to park so that `needed` bytes become free: the first of `idle` that free any."""
    chosen: list[ChainId] = []
    for chain in idle:
        if needed > 0 and freeable.get(chain, 0) > 0:
            chosen.append(chain)
            needed -= freeable[chain]
    return chosen


class Provision:
    """Owns the set of chains, and the requests that wait for parked ones."""

    def __init__(
        self,
        chains: Chains,
        runner: Runner,
        residency: Residency,
        send: Callable[[wire.Report], None],
        warm_up: Callable[[ServedChain], None],
    ) -> None:
        self._chains = chains
        self._runner = runner
        self._residency = residency
        self._send = send
        self._warm_up = warm_up
        self._orders: dict[ChainId, wire.Load] = {}
        self._parked: set[ChainId] = set()
        self._blocked: set[ChainId] = set()
        self._waiting: dict[ChainId, dict[wire.RequestId, Waiting]] = {}
        self._used: dict[ChainId, int] = {}
        self._uses = 0
        self.parked_times = 0

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for its chain to come back."""
        return bool(self._waiting)

    # ---- what the engine and the loop ask -------------------------------------------------------

    def load(self, order: wire.Load) -> None:
        """Make a chain ready; Loaded or Failed will follow."""
        self._orders[order.chain] = order
        self._residency.load(order)

    def evict(self, number: ChainId) -> list[Waiting]:
        """Forget a chain once its requests have ended; those that waited for it are given up."""
        chain = self._chains.get(number)
        if chain is not None and chain.users:
            chain.leaving = True
            return []
        if chain is not None:
            self._remove(chain)
        self._orders.pop(number, None)
        self._used.pop(number, None)
        self._parked.discard(number)
        self._blocked.discard(number)
        self._residency.evict(number)
        return list(self._waiting.pop(number, {}).values())

    def use(self, number: ChainId) -> ServedChain | None:
        """The chain, for a request, if it is ready."""
        chain = self._chains.get(number)
        if chain is None or chain.leaving:
            return None
        self._uses += 1
        self._used[number] = self._uses
        return chain

    def wait(self, opened: wire.Open, prompt: wire.Prompt) -> bool:
        """Keep a request until its chain is back; False if it is not parked."""
        number = opened.chain
        if number not in self._parked:
            return False
        if number not in self._waiting:
            self._waiting[number] = {}
            self._residency.load(self._orders[number])
        self._waiting[number][prompt.request] = (opened, prompt)
        return True

    def close(self, request: wire.RequestId) -> None:
        """Forget a request that waits."""
        for waiting in self._waiting.values():
            waiting.pop(request, None)

    def ended(self, chain: ServedChain) -> None:
        """A chain has lost a user: it may leave, or make room for those that lacked it."""
        if chain.users:
            return
        if chain.leaving:
            self.evict(chain.id)
        blocked, self._blocked = self._blocked, set()
        for number in blocked:
            self._residency.load(self._orders[number])

    # ---- what the loader thread has done --------------------------------------------------------

    def adopt(self, loaded: LoadedChain, longest: int) -> list[Waiting]:
        """Take in a resident chain, unless it was evicted meanwhile: what waited for it."""
        number = loaded.chain.id
        if number not in self._orders:
            return []
        self._chains.add(loaded.chain)
        self._runner.add(loaded)
        self._warm_up(loaded.chain)
        if number in self._parked:
            self._parked.discard(number)
        else:
            self._send(
                wire.Loaded(
                    chain=number,
                    moved_bytes=loaded.moved_bytes,
                    chain_bytes=loaded.chain_bytes,
                    seconds=loaded.seconds,
                    max_tokens=longest,
                    weight_error=loaded.weight_error,
                )
            )
        return list(self._waiting.pop(number, {}).values())

    def reject(self, failure: LoadFailure) -> list[Waiting]:
        """A chain did not fit or cannot be loaded: make room, wait for room, or give up."""
        number = failure.chain
        if number not in self._orders:
            return []
        if failure.missing:
            chosen = victims(failure.missing, failure.freeable, self._idle())
            for victim in chosen:
                self._park(victim)
            if chosen:
                self._residency.load(self._orders[number])
                return []
            if any(failure.freeable.get(c.id, 0) for c in self._chains):
                self._blocked.add(number)
                return []
        if number not in self._parked:
            self._send(wire.Failed(number, wire.RequestId(-1), failure.reason))
        return list(self._waiting.pop(number, {}).values())

    def gone(self, eviction: Eviction) -> None:
        """Weights were freed; the engine is told unless the chain is only parked."""
        if not eviction.parked:
            self._send(wire.Evicted(eviction.chain, eviction.freed_bytes))

    def _idle(self) -> list[ChainId]:
        unused = [c.id for c in self._chains if c.users == 0 and not c.leaving]
        return sorted(unused, key=lambda number: self._used.get(number, 0))

    def _park(self, number: ChainId) -> None:
        chain = self._chains.get(number)
        assert chain is not None
        self._remove(chain)
        self._parked.add(number)
        self.parked_times += 1
        self._residency.evict(number, parked=True)

    def _remove(self, chain: ServedChain) -> None:
        self._chains.remove(chain.id)
        self._runner.remove(chain.id)
