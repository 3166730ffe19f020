"""Says no to what needs weights where there are only shapes."""

from collections.abc import Iterable

from zoo.errors import UnsupportedOption
from zoo.manifest import Variant


def check_weights(variants: Iterable[Variant], wanted: str) -> None:
    """Refuse to have something done ("exported") with variants that are dummies."""
    for variant in variants:
        if variant.dummy:
            raise UnsupportedOption(
                f"{variant.name} is a dummy, shapes without weights: it cannot be {wanted}"
            )
