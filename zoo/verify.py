"""Hashing everything again: which objects are bad, and which variants that touches."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from zoo.catalog import Catalog
from zoo.errors import DamagedObject, MissingObject
from zoo.manifest import ObjectDigest
from zoo.progress import Progress
from zoo.reach import Reach
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Damage:
    """One object that is not what it should be; `fault` is "damaged" or "missing"."""

    digest: ObjectDigest
    fault: str
    variants: list[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many objects were looked at, and what is wrong."""

    checked: int
    damages: list[Damage]


def verify(root: Path, progress: Progress) -> Verdict:
    """Check every object that a variant needs and every other one that is on disk."""
    store = Store(root)
    users: dict[ObjectDigest, list[str]] = {digest: [] for digest in store.digests()}
    with contextlib.closing(Catalog(root)) as catalog:
        reach = Reach(catalog)
        for variant in catalog.variants():
            for digest in reach.footprint(variant).objects:
                users.setdefault(digest, []).append(variant.name)
    damages: list[Damage] = []
    for digest in progress.track(sorted(users), "verifying"):
        fault = _fault(store, digest)
        if fault:
            damages.append(Damage(digest, fault, users[digest]))
    return Verdict(len(users), damages)


def _fault(store: Store, digest: ObjectDigest) -> str | None:
    try:
        store.verify(digest)
    except MissingObject:
        return "missing"
    except DamagedObject:
        return "damaged"
    return None
