"""Checking everything again: which objects and which rows of the catalog are bad, and which
variants that touches."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from zoo.catalog import Catalog
from zoo.dummy.refusal import check_weights
from zoo.errors import DamagedObject, MissingObject
from zoo.findings import Findings
from zoo.keeping.audit import audit
from zoo.keeping.reach import Reach
from zoo.manifest import ObjectDigest
from zoo.progress import Progress
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Damage:
    """One object or manifest that is not what it should be. `fault` is "damaged", "missing", or
    "unreadable" for a difference whose parent is one of those. `variants` are variants, aliases and
    older versions (NAME@N) that it touches, `findings` what was measured or made of it."""

    digest: str
    fault: str
    variants: list[str]
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many objects were looked at, and what is wrong."""

    checked: int
    damages: list[Damage]


class _Users:
    """Who needs an object: by name, and through which difference."""

    def __init__(self) -> None:
        self.variants: dict[ObjectDigest, list[str]] = {}
        self.findings: dict[ObjectDigest, list[str]] = {}

    def need(self, name: str, digests: Iterable[ObjectDigest]) -> None:
        """Note that `name` cannot do without these."""
        for digest in digests:
            self.variants.setdefault(digest, []).append(name)

    def need_of(self, digest: ObjectDigest) -> bool:
        """Whether anybody needs an object."""
        return digest in self.variants or digest in self.findings

    def inherit(self, parent: ObjectDigest, child: ObjectDigest) -> None:
        """Note that who needs the child needs its parent."""
        for table in (self.variants, self.findings):
            merged = {*table.get(parent, ()), *table.get(child, ())}
            if merged:
                table[parent] = sorted(merged)

    def damage(self, digest: ObjectDigest, fault: str) -> Damage:
        """What a fault of this object or manifest touches."""
        return Damage(digest, fault, self.variants.get(digest, []), self.findings.get(digest, []))


def verify(root: Path, progress: Progress) -> Verdict:
    """Check every manifest, every object that is needed, and every other one that is on disk."""
    store = Store(root)
    with Catalog(root).snapshot() as catalog:
        check_weights(catalog.served(), "verified")
        damages = [Damage(what, "damaged", names) for what, names in audit(catalog).items()]
        if damages:
            # Whoever needs what cannot be told from manifests that are not what they were.
            return Verdict(0, damages)
        users = _users(catalog)
    known = {*store.digests(), *users.variants, *users.findings}
    parents = _parents(store, known)
    objects = sorted(known.union(parents.values()))
    bad: dict[ObjectDigest, str] = {}
    for digest in progress.track(sorted(objects, key=parents.__contains__), "verifying"):
        fault = _fault(store, digest)
        if fault:
            bad[digest] = "unreadable" if parents.get(digest) in bad else fault
    if bad:
        # Looked at again: what nobody needs any more may have been swept meanwhile, and what was
        # swept may have been written anew.
        with Catalog(root).snapshot() as catalog:
            users = _users(catalog)
        for child, parent in parents.items():
            users.inherit(parent, child)
        bad = {d: fault for d, fault in bad.items() if _is_still_bad(store, users, d)}
    return Verdict(len(objects), [users.damage(digest, fault) for digest, fault in bad.items()])


def _users(catalog: Catalog) -> _Users:
    reach, users = Reach(catalog), _Users()
    for variant in catalog.served():
        users.need(variant.name, reach.footprint(variant).objects)
    newest = {version.name: version.number for version in catalog.versions()}
    names = {variant.name for variant in catalog.variants()}
    for version in catalog.versions():
        is_old = version.number < newest[version.name] or version.name not in names
        if version.is_there and is_old:
            variant = catalog.variant(version.reference)
            users.need(version.reference, reach.footprint(variant).objects)
    users.findings = Findings(catalog).objects()
    return users


def _parents(store: Store, objects: Iterable[ObjectDigest]) -> dict[ObjectDigest, ObjectDigest]:
    found: dict[ObjectDigest, ObjectDigest] = {}
    for digest in objects:
        with contextlib.suppress(DamagedObject):
            parent = store.parent(digest)
            if parent:
                found[digest] = parent
    return found


def _is_still_bad(store: Store, users: _Users, digest: ObjectDigest) -> bool:
    return (users.need_of(digest) or store.has(digest)) and _fault(store, digest) is not None


def _fault(store: Store, digest: ObjectDigest) -> str | None:
    try:
        store.verify(digest)
    except MissingObject:
        return "missing"
    except DamagedObject:
        return "damaged"
    return None
