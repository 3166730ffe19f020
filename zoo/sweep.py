"""Removing what no variant needs any more: objects, manifests, and files of writers that were
killed.

Runs under the writer's lock, so it never meets an `add` that has written objects but not
published.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from zoo.catalog import Catalog
from zoo.lock import writing
from zoo.manifest import ObjectDigest
from zoo.progress import Progress
from zoo.reach import Reach
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Rubbish:
    """What a sweep removes, or would remove."""

    objects: list[ObjectDigest] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    bytes: int = 0


def sweep(root: Path, *, delete: bool, wait_s: float, progress: Progress) -> Rubbish:
    """Find what is unreachable from the catalog's variants; remove it if `delete`."""
    if not root.is_dir():
        return Rubbish()
    with writing(root, wait_s, progress.say):
        store = Store(root)
        catalog = Catalog(root, writable=delete)
        with contextlib.closing(catalog):
            reached = Reach(catalog).digests(catalog.variants())
            rubbish = _find(store, reached)
            if delete:
                # Rows first: a crash in between leaves files that the next sweep finds again.
                catalog.prune(reached)
                _delete(store, rubbish, progress)
    return rubbish


def _find(store: Store, reached: set[str]) -> Rubbish:
    objects = sorted(digest for digest in store.digests() if digest not in reached)
    leftovers = store.leftovers()
    files = [*(store.path(digest) for digest in objects), *leftovers]
    return Rubbish(objects, leftovers, sum(file.stat().st_size for file in files))


def _delete(store: Store, rubbish: Rubbish, progress: Progress) -> None:
    for path in rubbish.leftovers:
        path.unlink(missing_ok=True)
    for digest in progress.track(rubbish.objects, "sweeping"):
        store.delete(digest)
