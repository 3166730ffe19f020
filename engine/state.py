"""What the engine knows: workers, chains, variants and live requests.

`Cluster.apply(event)` is the only place where any of it changes; everyone else reads. Time is not
kept here: who needs it brings it along.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, assert_never

from engine.events import (
    Advanced,
    AnyEvent,
    Arrived,
    Began,
    ChainEvent,
    ChainEvicting,
    ChainFailed,
    ChainLoaded,
    ChainLoading,
    Closed,
    Opened,
    RequestEvent,
    Returned,
    VariantAppeared,
    VariantRetired,
    WorkerEvent,
    WorkerGreeted,
    WorkerLost,
    WorkerReported,
)
from workers import wire
from workers.wire import ChainId, RequestId
from zoo.manifest import ChainDigest, Variant

Residency = Literal["loaded", "loading", "stored", "failed"]


@dataclass(slots=True)
class Holding:
    """A chain on a worker."""

    state: Literal["loading", "loaded", "failed"]
    loaded: wire.Loaded | None = None
    reason: str = ""


@dataclass(slots=True)
class Worker:
    """A worker process that has greeted; a restarted one is another worker with another name."""

    name: str
    hello: wire.Hello
    status: wire.Status | None = None
    holdings: dict[ChainId, Holding] = field(default_factory=dict)
    opened: set[RequestId] = field(default_factory=set)
    unstarted: int = 0


@dataclass(slots=True)
class ServedChain:
    """A chain under its number. `requests` wait for it or run on it."""

    number: ChainId
    digest: ChainDigest
    units: int
    context: int
    names: set[str] = field(default_factory=set)
    requests: set[RequestId] = field(default_factory=set)
    recent_worker: str = ""


@dataclass(slots=True)
class Served:
    """A variant that clients may name."""

    variant: Variant
    chain: ChainId


@dataclass(slots=True)
class Live:
    """A request between its arrival and its end. Prompt and emitted tokens are all that is needed
    to continue it on another worker; `attempt` is the number that workers know it by, new each
    time."""

    number: RequestId
    chain: ChainId
    prompt: list[int]
    sampling: wire.Sampling
    salt: int
    priority: int
    emitted: list[int] = field(default_factory=list)
    attempt: RequestId | None = None
    attempts: int = 0
    hops: tuple[wire.Hop, ...] = ()
    has_begun: bool = False
    cached_tokens: int | None = None


class Cluster:
    """All workers, chains, variants and requests of one engine."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.chains: dict[ChainId, ServedChain] = {}
        self.numbers: dict[ChainDigest, ChainId] = {}
        self.variants: dict[str, Served] = {}
        self.requests: dict[RequestId, Live] = {}
        self.attempts: dict[RequestId, Live] = {}
        # Sums of workers that are gone: what a worker counts must not fall when it is restarted.
        self.past_counters: Counter[str] = Counter()

    # ---- reading --------------------------------------------------------------------------------

    def residency(self, number: ChainId) -> Residency:
        """Where a chain is, at its best."""
        states = {
            worker.holdings[number].state
            for worker in self.workers.values()
            if number in worker.holdings
        }
        if "loaded" in states:
            return "loaded"
        if "loading" in states:
            return "loading"
        return "failed" if states else "stored"

    def failure(self, number: ChainId) -> str:
        """Why a chain is not served, in the worker's words."""
        holdings = (worker.holdings.get(number) for worker in self.workers.values())
        return next((holding.reason for holding in holdings if holding and holding.reason), "")

    def capacity(self, number: ChainId) -> int | None:
        """Longest prompt and answer together that each worker holding the chain has pages for."""
        found = [
            holding.loaded.max_tokens
            for worker in self.workers.values()
            if (holding := worker.holdings.get(number)) is not None and holding.loaded is not None
        ]
        return min(found) if found else None

    def news(self, tokens: wire.Tokens) -> tuple[list[int], set[RequestId]]:
        """Rows of a wave that bring the next token of a live request, and the requests of which a
        token before those is missing. Repeated rows and rows of ended requests are neither."""
        rows: list[int] = []
        gaps: set[RequestId] = set()
        expected: dict[RequestId, int] = {}
        for row, attempt in enumerate(tokens.requests):
            live = self.attempts.get(attempt)
            if live is None:
                continue
            due = expected.get(attempt, len(live.emitted))
            index = tokens.indices[row]
            if index == due:
                rows.append(row)
                expected[attempt] = due + 1
            elif index > due:
                gaps.add(live.number)
        return rows, gaps

    def counters(self) -> Counter[str]:
        """Sums that the workers count, over every worker there was."""
        total = Counter(self.past_counters)
        for worker in self.workers.values():
            if worker.status is not None:
                total.update(worker.status.counters)
        return total

    # ---- changing -------------------------------------------------------------------------------

    def apply(self, event: AnyEvent) -> None:
        """Let an event happen."""
        if isinstance(event, RequestEvent):
            self._apply_request(event)
        elif isinstance(event, WorkerEvent):
            self._apply_worker(event)
        else:
            self._apply_chain(event)

    def _apply_worker(self, event: WorkerEvent) -> None:
        match event:
            case WorkerGreeted(hello):
                self.workers[hello.name] = Worker(hello.name, hello)
            case WorkerReported(name, status):
                self.workers[name].status = status
            case WorkerLost(name):
                worker = self.workers.pop(name)
                if worker.status is not None:
                    self.past_counters.update(worker.status.counters)
            case _:
                assert_never(event)

    def _apply_chain(self, event: ChainEvent) -> None:
        match event:
            case VariantAppeared(variant, number, digest, units):
                self._retire(variant.name)
                made = ServedChain(number, digest, units, variant.context)
                chain = self.chains.setdefault(number, made)
                chain.names.add(variant.name)
                self.numbers[digest] = number
                self.variants[variant.name] = Served(variant, number)
            case VariantRetired(name):
                self._retire(name)
            case ChainLoading(name, number):
                self.workers[name].holdings[number] = Holding("loading")
            case ChainLoaded(name, loaded):
                self.workers[name].holdings[loaded.chain] = Holding("loaded", loaded)
            case ChainFailed(name, number, reason):
                self.workers[name].holdings[number] = Holding("failed", reason=reason)
            case ChainEvicting(number):
                del self.numbers[self.chains.pop(number).digest]
                for worker in self.workers.values():
                    worker.holdings.pop(number, None)
            case _:
                assert_never(event)

    def _apply_request(self, event: RequestEvent) -> None:
        match event:
            case Advanced(tokens, rows):
                for row in rows:
                    self.attempts[tokens.requests[row]].emitted.append(tokens.tokens[row])
            case Arrived(number, chain, prompt, sampling, salt, priority):
                live = Live(number, chain, prompt, sampling, salt, priority)
                self.requests[number] = live
                self.chains[chain].requests.add(number)
            case Opened():
                self._open(event)
            case Began(number, cached_tokens):
                self._begin(self.requests[number], cached_tokens)
            case Returned(number):
                self._take_back(self.requests[number])
            case Closed(number):
                live = self.requests.pop(number)
                self._take_back(live)
                self.chains[live.chain].requests.discard(number)
            case _:
                assert_never(event)

    def _retire(self, name: str) -> None:
        served = self.variants.pop(name, None)
        if served is not None:
            self.chains[served.chain].names.discard(name)

    def _open(self, event: Opened) -> None:
        live = self.requests[event.request]
        live.attempt = event.attempt
        live.attempts += 1
        live.hops = event.hops
        live.has_begun = False
        live.sampling = event.sampling
        self.attempts[event.attempt] = live
        self.chains[live.chain].recent_worker = event.hops[0].worker
        for hop in event.hops:
            worker = self.workers[hop.worker]
            worker.opened.add(live.number)
            worker.unstarted += 1

    def _begin(self, live: Live, cached_tokens: int) -> None:
        # The count of the first attempt is the client's: later ones find what this request left.
        if live.cached_tokens is None:
            live.cached_tokens = cached_tokens
        self._count_begun(live)

    def _count_begun(self, live: Live) -> None:
        if live.has_begun:
            return
        live.has_begun = True
        for hop in live.hops:
            if hop.worker in self.workers:
                self.workers[hop.worker].unstarted -= 1

    def _take_back(self, live: Live) -> None:
        if live.attempt is None:
            return
        self._count_begun(live)
        del self.attempts[live.attempt]
        live.attempt = None
        for hop in live.hops:
            if hop.worker in self.workers:
                self.workers[hop.worker].opened.discard(live.number)
        live.hops = ()
