"""Pure: what a client is told of answers that are not exact."""

from engine.api import Approximation
from engine.config import Config
from zoo.manifest import Variant


def approximation_of(variant: Variant, config: Config) -> Approximation | None:
    """What was measured of the variant when it was added, and what the server rounds; None where
    its answers are exact."""
    measured, weights, kv_cache = variant.measured, _weights(config), _kv_cache(config)
    if measured is None:
        if weights is None and kv_cache is None:
            return None
        return Approximation(variant.store, weights=weights, kv_cache=kv_cache)
    return Approximation(
        store=variant.store,
        agreement=measured.agreement.value,
        agreement_low=measured.agreement.low,
        kl=measured.kl.value,
        tokens=measured.tokens,
        weights=weights,
        kv_cache=kv_cache,
    )


def warning(config: Config) -> str:
    """One sentence for who starts such a server; empty where it serves every chain exactly."""
    weights, kv_cache = _weights(config), _kv_cache(config)
    reasons = [f"linear layers are kept in {weights} (--weights)"] if weights else []
    reasons += [f"KV pages hold {kv_cache} (--kv-cache-dtype)"] if kv_cache else []
    return f"answers are approximate: {' and '.join(reasons)}" if reasons else ""


def _weights(config: Config) -> str | None:
    return None if config.weights == "exact" else config.weights


def _kv_cache(config: Config) -> str | None:
    return config.kv_cache_dtype if config.kv_cache_dtype == "bfloat16" else None
