"""Removing what no variant needs any more: objects, their packed forms, manifests, files of
writers that were killed, and the work of long jobs that nobody goes on with.

Kept are the objects of every variant, of the versions that aliases stay with, of findings, and what
any of these is a difference to. Older versions go. Runs under the writer's lock, so it never meets
an `add` that has written objects but not published.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from zoo.catalog import Catalog, Version
from zoo.findings import Findings
from zoo.keeping.reach import Reach
from zoo.lock import writing
from zoo.manifest import ObjectDigest
from zoo.packed import packed_files
from zoo.progress import Progress
from zoo.store import Store
from zoo.work import forget, size_of, stale_work


@dataclass(frozen=True, slots=True)
class Rubbish:
    """What a sweep removes, or would remove; `versions` as NAME@N, `work` are folders. `leftovers`
    are files of writers that were killed, and packed forms of objects that go or are gone."""

    objects: list[ObjectDigest] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    work: list[Path] = field(default_factory=list)
    bytes: int = 0


def sweep(root: Path, *, delete: bool, wait_s: float, progress: Progress) -> Rubbish:
    """Find what is unreachable from the catalog's variants; remove it if `delete`."""
    if not root.is_dir():
        return Rubbish()
    with writing(root, wait_s, progress.say):
        store = Store(root)
        catalog = Catalog(root, writable=delete)
        with contextlib.closing(catalog):
            reached = _reached(catalog, store)
            lost = _lost(catalog, reached)
            rubbish = _find(store, reached, lost, stale_work(root))
            if delete:
                # Rows first: a crash in between leaves files that the next sweep finds again.
                catalog.prune(reached, lost)
                _delete(store, rubbish, progress)
    return rubbish


def _reached(catalog: Catalog, store: Store) -> set[str]:
    """The digests of all manifests and objects that stay."""
    reached = Reach(catalog).digests(catalog.served())
    reached.update(Findings(catalog).objects())
    parents = {store.parent(digest) for digest in store.digests() if digest in reached}
    return reached.union(parent for parent in parents if parent)


def _lost(catalog: Catalog, reached: set[str]) -> list[Version]:
    """The versions that cannot be made any more of what stays."""
    reach = Reach(catalog)
    return [
        version
        for version in catalog.versions()
        if version.is_there and not reach.digests([catalog.variant(version.reference)]) <= reached
    ]


def _find(store: Store, reached: set[str], lost: list[Version], work: list[Path]) -> Rubbish:
    objects = sorted(digest for digest in store.digests() if digest not in reached)
    kept = {digest for digest in store.digests() if digest in reached}
    packed = [path for path, digest in packed_files(store.root) if digest not in kept]
    leftovers = [*store.leftovers(), *packed]
    files = [*(store.path(digest) for digest in objects), *leftovers]
    versions = [version.reference for version in lost]
    freed = sum(file.stat().st_size for file in files) + sum(size_of(one) for one in work)
    return Rubbish(objects, leftovers, versions, work, freed)


def _delete(store: Store, rubbish: Rubbish, progress: Progress) -> None:
    for path in rubbish.leftovers:
        path.unlink(missing_ok=True)
    for folder in rubbish.work:
        forget(folder)
    for digest in progress.track(rubbish.objects, "sweeping"):
        store.delete(digest)
