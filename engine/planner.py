"""Pure: a chain and the cluster give the hops that serve it, or the reason there are none."""

from dataclasses import dataclass
from typing import Literal

from engine.state import Cluster, Worker
from workers.wire import ChainId, Hop

# How many requests a worker may hold that it has not begun: enough to fill its next batches. More
# would be out of reach of the fair queue, which alone knows tenants.
AHEAD = 32


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Why a chain cannot be served now. "wait": it will be; "failed": it won't, for `message`."""

    kind: Literal["wait", "failed"]
    message: str = ""


def plan(cluster: Cluster, number: ChainId) -> tuple[Hop, ...] | NoPlan:
    """Hops for one request on a chain. Every worker holds whole chains, so there is one hop: on the
    worker with the fewest requests, among equals the one that served the chain last."""
    holders = [worker for worker in cluster.workers.values() if _holds(worker, number)]
    if not holders:
        if cluster.residency(number) == "failed":
            return NoPlan("failed", cluster.failure(number))
        return NoPlan("wait")
    free = [worker for worker in holders if _has_room(worker)]
    if not free:
        return NoPlan("wait")
    chain = cluster.chains[number]
    best = min(free, key=lambda w: (len(w.opened), w.name != chain.recent_worker, w.name))
    return (Hop(best.name, 0, chain.units),)


def _holds(worker: Worker, number: ChainId) -> bool:
    holding = worker.holdings.get(number)
    return holding is not None and holding.state == "loaded"


def _has_room(worker: Worker) -> bool:
    return len(worker.opened) < worker.hello.max_sequences and worker.unstarted < AHEAD
