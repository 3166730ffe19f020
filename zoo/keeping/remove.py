"""Forgetting a variant; its objects stay until the sweep, so what is being served goes on."""

import contextlib
from pathlib import Path

from zoo.catalog import Catalog
from zoo.lock import writing
from zoo.manifest import Variant
from zoo.progress import Progress


def remove(root: Path, name: str, *, wait_s: float, progress: Progress) -> Variant:
    """Remove the variant `name`; raises UnknownVariant. Adapters made upon it keep working."""
    with contextlib.closing(Catalog(root)) as catalog:
        catalog.variant(name)
    with (
        writing(root, wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        return catalog.remove(name)
