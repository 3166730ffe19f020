"""Pure: what a client is told of a variant that is not kept exactly."""

from engine.api import Approximation
from zoo.manifest import Variant


def approximation_of(variant: Variant) -> Approximation | None:
    """What was measured of the variant when it was added; None where it is exact."""
    measured = variant.measured
    if measured is None:
        return None
    return Approximation(
        store=variant.store,
        agreement=measured.agreement.value,
        agreement_low=measured.agreement.low,
        kl=measured.kl.value,
        tokens=measured.tokens,
    )
