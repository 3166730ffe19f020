"""Metrics once more under the names that vLLM gives them, for dashboards that know those."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_NAMES = {
    "blockllm_requests_running": "vllm:num_requests_running",
    "blockllm_requests_waiting": "vllm:num_requests_waiting",
    "blockllm_kv_cache_usage": "vllm:kv_cache_usage_perc",
    "blockllm_prefix_cache_queries": "vllm:prefix_cache_queries",
    "blockllm_prefix_cache_hits": "vllm:prefix_cache_hits",
    "blockllm_spec_decode_num_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "blockllm_spec_decode_num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "blockllm_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "blockllm_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "blockllm_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "blockllm_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "blockllm_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "blockllm_request_decode_time_seconds": "vllm:request_decode_time_seconds",
    "blockllm_prompt_tokens": "vllm:prompt_tokens",
    "blockllm_generation_tokens": "vllm:generation_tokens",
    "blockllm_requests": "vllm:request_success",
    "blockllm_requests_rejected": "vllm:admission_rejections",
    "blockllm_requests_replayed": "vllm:num_preemptions",
}
_LABELS = {"variant": "model_name", "finish_reason": "finished_reason", "worker": "engine"}


class VllmNames(Collector):
    """The metrics of a registry, and those that vLLM has too under its names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All families; called by the registry this is registered in."""
        for family in self._registry.collect():
            yield family
            name = _NAMES.get(family.name)
            if name is not None:
                yield _renamed(family, name)


def _renamed(family: Metric, name: str) -> Metric:
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [
        Sample(
            name + sample.name.removeprefix(family.name),
            {_LABELS.get(label, label): value for label, value in sample.labels.items()},
            sample.value,
        )
        for sample in family.samples
    ]
    return copy
