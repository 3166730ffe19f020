"""What is measured of requests, by variant, and its rendering for Prometheus.

Gauges of workers and blocks are read from the cluster when they are asked for (`engine.gauges`).
"""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from engine import api
from engine.delivery import Delivery
from engine.vllm_names import VllmNames

# Variants with series of their own; further ones share the name OTHER.
MAX_VARIANTS = 100
OTHER = "other"
_LABELS = ("variant",)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_WAIT_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480)


@dataclass(frozen=True, slots=True)
class Series:
    """What is measured of a variant's requests: the families, or one variant's part of them."""

    running: Gauge
    waiting: Gauge
    first_token: Histogram
    inter_token: Histogram
    whole: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    prompt_tokens: Counter
    generation_tokens: Counter

    def of(self, variant: str) -> "Series":
        """The children of these families for one variant."""
        return Series(
            running=self.running.labels(variant),
            waiting=self.waiting.labels(variant),
            first_token=self.first_token.labels(variant),
            inter_token=self.inter_token.labels(variant),
            whole=self.whole.labels(variant),
            queue=self.queue.labels(variant),
            prefill=self.prefill.labels(variant),
            decode=self.decode.labels(variant),
            prompt_tokens=self.prompt_tokens.labels(variant),
            generation_tokens=self.generation_tokens.labels(variant),
        )


class Metrics:
    """Counts requests and tokens. `prompt_tokens` and `generation_tokens` are the sums so far."""

    def __init__(self, *, vllm_names: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._variants: dict[str, tuple[str, Series]] = {}
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._finished = self._counter(
            "requests", "Requests that ended, by how.", (*_LABELS, "finish_reason")
        )
        self._rejected = self._counter("requests_rejected", "Requests refused.", ("reason",))
        self._replayed = self._counter(
            "requests_replayed", "Requests continued after they had lost their worker."
        )
        self._all = self._families()
        self._shown = self._registry
        if vllm_names:
            self._shown = CollectorRegistry()
            self._shown.register(VllmNames(self._registry))

    def watch(self, collector: Collector) -> None:
        """Render what `collector` gives, too."""
        self._registry.register(collector)

    def render(self) -> str:
        """Everything as Prometheus text."""
        return generate_latest(self._shown).decode()

    # ---- a request's life -----------------------------------------------------------------------

    def arrived(self, delivery: Delivery) -> None:
        """A request waits."""
        self._of(delivery).waiting.inc()

    def opened(self, delivery: Delivery, now: float) -> None:
        """A worker has it."""
        series = self._of(delivery)
        series.waiting.dec()
        series.running.inc()
        if delivery.opened_s is None:
            delivery.opened_s = now
            series.queue.observe(now - delivery.arrived_s)
            series.prompt_tokens.inc(len(delivery.ask.prompt))
            self.prompt_tokens += len(delivery.ask.prompt)

    def returned(self, delivery: Delivery) -> None:
        """It lost its worker and waits again."""
        series = self._of(delivery)
        series.running.dec()
        series.waiting.inc()
        self._replayed.inc()

    def token(self, delivery: Delivery, now: float) -> None:
        """A token is on its way to the client. Of several that a wave made at once, only the first
        has come a time after another one."""
        series = self._of(delivery)
        if delivery.first_s is None:
            delivery.first_s = now
            series.first_token.observe(now - delivery.arrived_s)
        elif now > delivery.last_s:
            series.inter_token.observe(now - delivery.last_s)
        delivery.last_s = now
        series.generation_tokens.inc()
        self.generation_tokens += 1

    def ended(self, delivery: Delivery, *, was_open: bool) -> None:
        """It is over, whatever the reason."""
        series = self._of(delivery)
        (series.running if was_open else series.waiting).dec()

    def finished(self, delivery: Delivery, reason: api.FinishReason, now: float) -> None:
        """It ended with an answer."""
        name, series = self._entry(delivery.ask.model)
        self._finished.labels(name, reason).inc()
        series.whole.observe(now - delivery.arrived_s)
        if delivery.opened_s is not None and delivery.first_s is not None:
            series.prefill.observe(delivery.first_s - delivery.opened_s)
            series.decode.observe(delivery.last_s - delivery.first_s)

    def rejected(self, reason: str) -> None:
        """A request was refused, at once or later."""
        self._rejected.labels(reason).inc()

    # ---- series ---------------------------------------------------------------------------------

    def _of(self, delivery: Delivery) -> Series:
        return self._entry(delivery.ask.model)[1]

    def _entry(self, variant: str) -> tuple[str, Series]:
        entry = self._variants.get(variant)
        if entry is None:
            name = variant if len(self._variants) < MAX_VARIANTS else OTHER
            if name == OTHER and OTHER in self._variants:
                return self._variants[OTHER]
            entry = self._variants[name] = (name, self._all.of(name))
        return entry

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"blockllm_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"blockllm_{name}", text, _LABELS, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"blockllm_{name}_seconds", text, _LABELS, buckets=buckets, registry=self._registry
        )

    def _families(self) -> Series:
        return Series(
            running=self._gauge("requests_running", "Requests that workers have."),
            waiting=self._gauge("requests_waiting", "Requests that wait for a worker."),
            first_token=self._histogram(
                "time_to_first_token", "From arrival to the first token.", _WAIT_S
            ),
            inter_token=self._histogram(
                "inter_token_latency", "From one token to the next.", _TOKEN_S
            ),
            whole=self._histogram(
                "e2e_request_latency", "From arrival to the last token.", _REQUEST_S
            ),
            queue=self._histogram("request_queue_time", "From arrival to a worker.", _REQUEST_S),
            prefill=self._histogram(
                "request_prefill_time", "From a worker to the first token.", _REQUEST_S
            ),
            decode=self._histogram(
                "request_decode_time", "From the first to the last token.", _REQUEST_S
            ),
            prompt_tokens=self._counter("prompt_tokens", "Tokens of prompts.", _LABELS),
            generation_tokens=self._counter("generation_tokens", "Tokens of answers.", _LABELS),
        )
