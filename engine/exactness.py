"""Pure: what a client is told of answers that are not exact."""

from engine.api import Approximation
from engine.config import Config
from zoo.manifest import Variant


def approximation_of(variant: Variant, config: Config) -> Approximation | None:
    """What was measured of the variant when it was added, and what the server rounds; None where
    its answers are exact."""
    measured = variant.measured
    kv_cache = _kv_cache(config)
    if measured is None:
        return None if kv_cache is None else Approximation(variant.store, kv_cache=kv_cache)
    return Approximation(
        store=variant.store,
        agreement=measured.agreement.value,
        agreement_low=measured.agreement.low,
        kl=measured.kl.value,
        tokens=measured.tokens,
        kv_cache=kv_cache,
    )


def warning(config: Config) -> str:
    """One sentence for who starts such a server; empty where it serves every chain exactly."""
    if _kv_cache(config) is None:
        return ""
    return "answers are approximate: KV pages hold bfloat16, as --kv-cache-dtype asks"


def _kv_cache(config: Config) -> str | None:
    return config.kv_cache_dtype if config.kv_cache_dtype == "bfloat16" else None
