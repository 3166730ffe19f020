"""Giving and taking aliases: names that stay with one version of a variant."""

import contextlib
from pathlib import Path

from zoo.catalog import Alias, Catalog
from zoo.lock import writing
from zoo.names import checked_name
from zoo.progress import Progress


def pin(root: Path, alias: str, target: str, *, wait_s: float, progress: Progress) -> Alias:
    """Let `alias` stay with the version that `target` (NAME, NAME@N or an alias) means now; an
    alias of that name moves. Raises a ZooError."""
    checked_name(alias)
    with contextlib.closing(Catalog(root)) as reader:
        reader.variant(target)
    with (
        writing(root, wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        return catalog.set_alias(alias, target)


def unpin(root: Path, alias: str, *, wait_s: float, progress: Progress) -> None:
    """Forget an alias; what only it kept goes with the next sweep. Raises UnknownVariant."""
    with contextlib.closing(Catalog(root)) as reader:
        reader.alias(alias)
    with (
        writing(root, wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        catalog.remove_alias(alias)
