"""Pure: the cluster as a plain mapping, for `status`, `top`, the dashboard and JSON."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from engine.api import Approximation
from engine.gauges import kv_usage
from engine.state import Cluster, Served, Worker
from workers import wire
from zoo.manifest import Variant

Exactness = Callable[[Variant], Approximation | None]


def snapshot(cluster: Cluster, approximation_of: Exactness) -> dict[str, Any]:
    """Requests, workers, blocks and variants as they are now."""
    running = sum(live.attempt is not None for live in cluster.requests.values())
    return {
        "requests": {"running": running, "waiting": len(cluster.requests) - running},
        "workers": [_worker(worker) for worker in cluster.workers.values()],
        "blocks": [
            _block(worker.name, block)
            for worker in cluster.workers.values()
            if worker.status is not None
            for block in worker.status.blocks
        ],
        "variants": _variants(cluster, approximation_of),
        "counters": dict(cluster.counters()),
    }


def _worker(worker: Worker) -> dict[str, Any]:
    hello, status = worker.hello, worker.status
    shown: dict[str, Any] = {
        "name": worker.name,
        "device": hello.device,
        "ops": hello.ops,
        "pid": hello.pid,
        "opened": len(worker.opened),
        "max_sequences": hello.max_sequences,
        "page": hello.page,
        "kv_bytes": hello.kv_bytes,
        "dtype": hello.dtype,
        "kv_dtype": hello.kv_dtype,
        "weights": hello.weights,
    }
    if status is not None:
        fields = msgspec.structs.asdict(status)
        del fields["blocks"]
        shown |= {"gauges": fields.pop("device"), "kv_usage": kv_usage(status)} | fields
    return shown


def _block(worker: str, block: wire.BlockReport) -> dict[str, Any]:
    mean = block.rows / block.runs if block.runs else 0.0
    return {"worker": worker, **msgspec.structs.asdict(block), "mean_batch": mean}


def _variants(cluster: Cluster, approximation_of: Exactness) -> list[dict[str, Any]]:
    running: Counter[int] = Counter()
    waiting: Counter[int] = Counter()
    for live in cluster.requests.values():
        (waiting if live.attempt is None else running)[live.chain] += 1
    return [
        _variant(cluster, served, approximation_of(served.variant))
        | {"running": running[served.chain], "waiting": waiting[served.chain]}
        for served in cluster.variants.values()
    ]


def _variant(
    cluster: Cluster, served: Served, approximation: Approximation | None
) -> dict[str, Any]:
    variant = served.variant
    loaded = next(
        (
            holding.loaded
            for worker in cluster.workers.values()
            if (holding := worker.holdings.get(served.chain)) and holding.loaded
        ),
        None,
    )
    shown: dict[str, Any] = {
        "name": variant.name,
        "kind": variant.kind,
        "family": variant.family,
        "base": variant.base,
        "fingerprint": variant.chain,
        "residency": cluster.residency(served.chain),
        "reason": cluster.failure(served.chain),
        "store": variant.store,
    }
    if approximation is not None:
        shown["approximation"] = msgspec.to_builtins(approximation)
    if loaded is not None:
        shown |= {
            "chain_bytes": loaded.chain_bytes,
            "moved_bytes": loaded.moved_bytes,
            "load_seconds": loaded.seconds,
            "max_tokens": loaded.max_tokens,
            "weight_error": loaded.weight_error,
        }
    return shown
