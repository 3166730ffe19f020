"""Workers, pages, blocks and residency as Prometheus gauges, read from the cluster on demand."""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.state import Cluster, Worker
from workers import wire

# Blocks with series of their own: those that computed most.
MAX_BLOCKS = 100
_BLOCK = ("worker", "block")


class ClusterGauges(Collector):
    """The state of a cluster as metrics. `counts` are sums of the engine's own, by name."""

    def __init__(self, cluster: Cluster, counts: Mapping[str, Counter[str]]) -> None:
        self._cluster = cluster
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """All families; called by the registry this is registered in."""
        told = [
            (worker, worker.status)
            for worker in self._cluster.workers.values()
            if worker.status is not None
        ]
        yield from _memory(told)
        yield from _devices(told)
        yield from _blocks(told)
        yield self._shared_ratio()
        yield from self._sums()

    def _shared_ratio(self) -> Metric:
        alone, together = 0, 0
        for worker in self._cluster.workers.values():
            held = (holding.loaded for holding in worker.holdings.values())
            alone += sum(loaded.chain_bytes for loaded in held if loaded is not None)
            together += worker.status.resident_bytes if worker.status is not None else 0
        return _single(
            "shared_weight_ratio",
            "Weights the loaded variants would take one by one, over what they take together.",
            alone / together if together else 0.0,
        )

    def _sums(self) -> Iterator[Metric]:
        counters = self._cluster.counters()
        for name, key, text in (
            ("prefix_cache_queries", "prefix_query_tokens", "Prompt tokens looked up."),
            ("prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens found in the cache."),
            ("spec_decode_num_draft_tokens", "draft_tokens", "Tokens that were guessed."),
            ("spec_decode_num_accepted_tokens", "accepted_tokens", "Guesses that were right."),
        ):
            yield CounterMetricFamily(f"blockllm_{name}", text, value=counters[key])
        work = CounterMetricFamily(
            "blockllm_worker_events", "Sums of the workers.", labels=["event"]
        )
        for key, value in sorted(counters.items()):
            work.add_metric([key], value)
        yield work
        dropped = CounterMetricFamily(
            "blockllm_dropped_messages", "Messages refused or undeliverable.", labels=["where"]
        )
        dropped.add_metric(
            ["worker"], counters["dropped_messages"] + self._counts["fleet"]["stray"]
        )
        dropped.add_metric(["malformed"], self._counts["gateway"]["malformed"])
        dropped.add_metric(["client"], self._counts["gateway"]["undelivered"])
        yield dropped
        restarts = self._counts["fleet"]["restarts"]
        yield CounterMetricFamily(
            "blockllm_worker_restarts", "Workers started anew.", value=restarts
        )


def kv_usage(status: wire.Status) -> float:
    """Share of the pages that running requests hold; cached ones are free for the asking."""
    used = status.total_pages - status.free_pages - status.cached_pages
    return max(used, 0) / status.total_pages if status.total_pages else 0.0


def _memory(told: list[tuple[Worker, wire.Status]]) -> Iterator[Metric]:
    usage = _family("kv_cache_usage", "Share of the KV pages in use.", "worker")
    pages = _family("kv_pages", "KV pages by state.", "worker", "state")
    memory = _family("memory_bytes", "Memory of a worker by use.", "worker", "use")
    chains = _family("loaded_variants", "Chains that a worker holds.", "worker")
    for worker, status in told:
        usage.add_metric([worker.name], kv_usage(status))
        for state in ("free", "cached", "total"):
            pages.add_metric([worker.name, state], getattr(status, f"{state}_pages"))
        for use in ("weight", "resident", "rss"):
            memory.add_metric([worker.name, use], getattr(status, f"{use}_bytes"))
        chains.add_metric([worker.name], status.chains)
    yield from (usage, pages, memory, chains)


def _devices(told: list[tuple[Worker, wire.Status]]) -> Iterator[Metric]:
    """What devices tell of themselves, as far as they do."""
    families = {
        reading: _family(f"device_{name}", text, "worker")
        for reading, name, text in (
            ("utilization", "utilization", "Share of the last moment in which the device worked."),
            ("memory_used_bytes", "memory_used_bytes", "Memory of the device that is taken."),
            ("memory_total_bytes", "memory_total_bytes", "Memory of the device."),
            ("power_w", "power_watts", "Power that the device draws."),
            ("temperature_c", "temperature_celsius", "Temperature of the device."),
            ("pcie_sent_bytes_per_s", "pcie_sent_bytes_per_second", "PCIe traffic to the host."),
            (
                "pcie_received_bytes_per_s",
                "pcie_received_bytes_per_second",
                "PCIe traffic from the host.",
            ),
            ("nvlinks", "nvlinks", "NVLinks in use."),
        )
    }
    for worker, status in told:
        for reading, family in families.items():
            if reading in status.device:
                family.add_metric([worker.name], status.device[reading])
    yield from families.values()


def _blocks(told: list[tuple[Worker, wire.Status]]) -> Iterator[Metric]:
    chains = _family("block_chains", "Chains that use a block.", *_BLOCK)
    size = _family("block_bytes", "Bytes of a block.", *_BLOCK)
    batch = _family("block_mean_batch", "Rows that one run of a block takes on average.", *_BLOCK)
    runs = CounterMetricFamily("blockllm_block_runs", "Runs of a block.", labels=_BLOCK)
    merged = CounterMetricFamily(
        "blockllm_block_merged_runs", "Runs of a block for several variants at once.", labels=_BLOCK
    )
    for worker, status in told:
        busiest = sorted(status.blocks, key=lambda block: block.rows, reverse=True)[:MAX_BLOCKS]
        for block in busiest:
            labels = [worker.name, block.digest[:12]]
            chains.add_metric(labels, block.chains)
            size.add_metric(labels, block.bytes)
            batch.add_metric(labels, block.rows / block.runs if block.runs else 0.0)
            runs.add_metric(labels, block.runs)
            merged.add_metric(labels, block.merged_runs)
    yield from (chains, size, batch, runs, merged)


def _family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"blockllm_{name}", text, labels=labels)


def _single(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"blockllm_{name}", text, value=value)
