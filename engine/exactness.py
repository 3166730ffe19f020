"""Pure: what a client is told of answers that are not exact."""

import msgspec

from engine.api import Approximation
from engine.config import Config
from zoo.manifest import Variant

_EXACT = ("auto", "exact", "float32")
_REASONS = {
    "dtype": "layers multiply {} (--dtype)",
    "weights": "linear layers are kept in {} (--weights)",
    "kv_cache": "KV pages hold {} (--kv-cache-dtype)",
}


def approximation_of(variant: Variant, config: Config) -> Approximation | None:
    """What was measured of the variant when it was added, and what the server rounds; None where
    its answers are exact."""
    measured, rounded = variant.measured, _rounded(config)
    if measured is None and not rounded:
        return None
    known = Approximation(variant.store)
    if measured is not None:
        known = Approximation(
            store=variant.store,
            agreement=measured.agreement.value,
            agreement_low=measured.agreement.low,
            kl=measured.kl.value,
            tokens=measured.tokens,
        )
    return msgspec.structs.replace(known, **rounded)


def warning(config: Config) -> str:
    """One sentence for who starts such a server; empty where it serves every chain exactly."""
    reasons = [_REASONS[name].format(dtype) for name, dtype in _rounded(config).items()]
    return f"answers are approximate: {' and '.join(reasons)}" if reasons else ""


def _rounded(config: Config) -> dict[str, str]:
    """What the server rounds, and to what: fields of an Approximation."""
    settings = {
        "dtype": config.dtype,
        "weights": config.weights,
        "kv_cache": config.kv_cache_dtype,
    }
    return {name: dtype for name, dtype in settings.items() if dtype not in _EXACT}
