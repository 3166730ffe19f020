"""The line about throughput that the log gets every few seconds while there is work."""

from engine.gauges import kv_usage
from engine.metrics import Metrics
from engine.state import Cluster

PERIOD_S = 10.0


class Throughput:
    """Rates between two looks at the metrics."""

    def __init__(self, metrics: Metrics, cluster: Cluster, now: float) -> None:
        self._metrics = metrics
        self._cluster = cluster
        self._before_s = now
        self._before = (0, 0)

    def line(self, now: float) -> str | None:
        """What to log, if it is time and something happened."""
        elapsed_s = now - self._before_s
        if elapsed_s < PERIOD_S:
            return None
        totals = (self._metrics.prompt_tokens, self._metrics.generation_tokens)
        prompts, answers = (new - old for new, old in zip(totals, self._before, strict=True))
        self._before_s, self._before = now, totals
        if not (prompts or answers or self._cluster.requests):
            return None
        running = sum(live.attempt is not None for live in self._cluster.requests.values())
        return (
            f"Avg prompt throughput: {prompts / elapsed_s:.1f} tokens/s, "
            f"Avg generation throughput: {answers / elapsed_s:.1f} tokens/s, "
            f"Running: {running} reqs, Waiting: {len(self._cluster.requests) - running} reqs, "
            f"KV cache usage: {self._usage():.1%}, Prefix cache hit rate: {self._hit_rate():.1%}"
        )

    def _usage(self) -> float:
        told = [w.status for w in self._cluster.workers.values() if w.status is not None]
        return max((kv_usage(status) for status in told), default=0.0)

    def _hit_rate(self) -> float:
        counters = self._cluster.counters()
        queries = counters["prefix_query_tokens"]
        return counters["prefix_hit_tokens"] / queries if queries else 0.0
