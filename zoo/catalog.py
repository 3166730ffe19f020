"""The catalog: which variants exist, and the manifests that say what they are made of.

A name means the newest of its numbered versions; an alias is a name that stays with one version.
Objects are on disk before a transaction names them. Rows of a removed variant stay until the sweep,
so what is being served goes on reading them.
"""

import contextlib
import sqlite3
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from zoo.database import FILE_NAME, Database
from zoo.errors import DamagedCatalog, NameTaken, UnknownVariant
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    Chain,
    ChainDigest,
    ObjectDigest,
    Unit,
    UnitDigest,
    Variant,
    canonical,
)
from zoo.schema import MANIFESTS, sha256
from zoo.store import ObjectInfo

__all__ = ["FILE_NAME", "Alias", "Catalog", "Publication", "Version", "name_taken"]

Manifest = TypeVar("Manifest")


class Publication(msgspec.Struct, frozen=True):
    """All that one `publish` makes known: a variant and every manifest and object it stands on."""

    variant: Variant
    chain: Chain
    units: dict[UnitDigest, Unit]
    attachments: dict[AttachmentDigest, Attachment]
    objects: dict[ObjectDigest, ObjectInfo]


class Version(msgspec.Struct, frozen=True):
    """What a name meant from one `publish` to the next. `is_there` until the sweep frees it."""

    name: str
    number: int
    chain: ChainDigest
    source: str
    created: float
    is_there: bool

    @property
    def reference(self) -> str:
        """What addresses it."""
        return f"{self.name}@{self.number}"


class Alias(msgspec.Struct, frozen=True):
    """A name that stays with one version of another name."""

    alias: str
    name: str
    number: int

    @property
    def reference(self) -> str:
        """The version that it stays with."""
        return f"{self.name}@{self.number}"


class Catalog:
    """The zoo's catalog. Read-only, it takes a file that does not exist yet for an empty one."""

    def __init__(self, root: Path, *, writable: bool = False) -> None:
        self.root = root
        self.database = Database(root, writable=writable)

    # ---- reading --------------------------------------------------------------------------------

    def variants(self) -> list[Variant]:
        """All variants by name, each as it is now."""
        rows = self.database.rows("SELECT manifest FROM variants ORDER BY name")
        return [_decode(row[0], Variant) for row in rows]

    def served(self) -> list[Variant]:
        """All variants, and under each alias the version that it stays with."""
        rows = self.database.rows(
            "SELECT name, manifest FROM variants UNION ALL "
            "SELECT alias, manifest FROM aliases JOIN versions USING (name, number) "
            "WHERE manifest IS NOT NULL ORDER BY 1"
        )
        return [_renamed(_decode(manifest, Variant), str(name)) for name, manifest in rows]

    def variant(self, reference: str) -> Variant:
        """The variant of a NAME, of an alias, or of NAME@N, an older version; it bears the name
        that was asked for. Raises UnknownVariant, which names those there are."""
        rows = self.database.rows(
            "SELECT manifest FROM versions WHERE name = ? AND number = ?",
            *self._pinned(reference),
        )
        if not rows:
            raise self._unknown(reference)
        if rows[0][0] is None:
            raise UnknownVariant(f"{reference!r} has been swept away: add it again")
        return _renamed(_decode(rows[0][0], Variant), reference)

    def versions(self, name: str | None = None) -> list[Version]:
        """All that a name ever meant, or all names, oldest first."""
        chosen, values = ("", ()) if name is None else ("WHERE name = ?", (name,))
        rows = self.database.rows(
            "SELECT name, number, chain, source, created, manifest IS NOT NULL FROM versions "
            f"{chosen} ORDER BY name, number",
            *values,
        )
        return [Version(*row[:5], is_there=bool(row[5])) for row in rows]

    def aliases(self) -> list[Alias]:
        """All aliases by name."""
        rows = self.database.rows("SELECT alias, name, number FROM aliases ORDER BY alias")
        return [Alias(*row) for row in rows]

    def alias(self, alias: str) -> Alias:
        """One alias; raises UnknownVariant."""
        rows = self.database.rows("SELECT alias, name, number FROM aliases WHERE alias = ?", alias)
        if not rows:
            raise UnknownVariant(f"there is no alias {alias!r} in {self.root}")
        return Alias(*rows[0])

    def check_free(self, name: str, *, replace: bool) -> None:
        """Refuse a name under which nothing may be published; raises NameTaken."""
        if any(alias.alias == name for alias in self.aliases()):
            raise NameTaken(f"{name!r} is an alias: remove the alias or use another name")
        if not replace and self.database.rows("SELECT 1 FROM variants WHERE name = ?", name):
            raise name_taken(name)

    def chain(self, digest: ChainDigest) -> Chain:
        """A chain by its digest; raises DamagedCatalog if it is not there."""
        return self._manifest("chains", digest, Chain)

    def unit(self, digest: UnitDigest) -> Unit:
        """A unit by its digest; raises DamagedCatalog if it is not there."""
        return self._manifest("units", digest, Unit)

    def attachment(self, digest: AttachmentDigest) -> Attachment:
        """An attachment by its digest; raises DamagedCatalog if it is not there."""
        return self._manifest("attachments", digest, Attachment)

    def objects(self) -> dict[ObjectDigest, ObjectInfo]:
        """All objects that a manifest or a variant names, or named before the last sweep."""
        rows = self.database.rows("SELECT digest, dtype, shape, nbytes FROM objects")
        return {
            ObjectDigest(digest): ObjectInfo(
                dtype, msgspec.json.decode(shape, type=tuple[int, ...]), nbytes
            )
            for digest, dtype, shape, nbytes in rows
        }

    def version(self) -> int:
        """A number that changes whenever another process has changed the catalog; 0 without one."""
        return self.database.version()

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Self]:
        """One look: all that is read within belongs together. The file is closed at its end."""
        with contextlib.closing(self), self.database.snapshot():
            yield self

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self.database.close()

    # ---- writing: the caller holds the writer's lock --------------------------------------------

    def publish(self, publication: Publication, *, replace: bool = False) -> None:
        """Make a variant known, all at once: the next version of its name. Raises NameTaken for the
        name of an alias, and unless `replace` for one that has a meaning."""
        variant = publication.variant
        with self.database.transaction() as connection:
            self.check_free(variant.name, replace=replace)
            _insert(connection, "chains", [(variant.chain, publication.chain)])
            _insert(connection, "units", publication.units.items())
            _insert(connection, "attachments", publication.attachments.items())
            connection.executemany(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)",
                [
                    (digest, info.dtype, msgspec.json.encode(info.shape).decode(), info.nbytes)
                    for digest, info in publication.objects.items()
                ],
            )
            _insert_version(connection, variant)

    def remove(self, name: str) -> Variant:
        """Forget a name; its manifests and objects stay until the sweep, those of versions that an
        alias stays with for good. Raises UnknownVariant."""
        variant = self.variant(name)
        with self.database.transaction() as connection:
            if not _is_name(connection, name):
                raise UnknownVariant(f"{name!r} is no variant's own name: give that of a variant")
            connection.execute("DELETE FROM variants WHERE name = ?", (name,))
        return variant

    def set_alias(self, alias: str, reference: str) -> Alias:
        """Let an alias stay with the version that a reference means now. Raises NameTaken for a
        variant's name, and UnknownVariant."""
        self.variant(reference)
        name, number = self._pinned(reference)
        with self.database.transaction() as connection:
            if _is_name(connection, alias):
                raise NameTaken(f"{alias!r} is a variant: remove it or choose another alias")
            connection.execute(
                "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (alias, name, number)
            )
        return Alias(alias, name, number)

    def remove_alias(self, alias: str) -> None:
        """Forget an alias; raises UnknownVariant."""
        self.alias(alias)
        with self.database.transaction() as connection:
            connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,))

    def prune(self, reached: Iterable[str], versions: Iterable[Version] = ()) -> None:
        """Forget every chain, unit, attachment and object whose digest is not among `reached`, and
        the manifests of the given versions."""
        keep = set(reached)
        with self.database.transaction() as connection:
            for table in (*MANIFESTS, "objects"):
                known = [row[0] for row in connection.execute(f"SELECT digest FROM {table}")]
                connection.executemany(
                    f"DELETE FROM {table} WHERE digest = ?",
                    [(digest,) for digest in known if digest not in keep],
                )
            connection.executemany(
                "UPDATE versions SET manifest = NULL WHERE name = ? AND number = ?",
                [(version.name, version.number) for version in versions],
            )

    # ---- looking things up ----------------------------------------------------------------------

    def _pinned(self, reference: str) -> tuple[str, int]:
        """Name and number of the version that a reference means; no version has the number 0."""
        name, at, number = reference.rpartition("@")
        if at and number.isdecimal() and len(number) < 10:
            return name, int(number)
        rows = self.database.rows(
            "SELECT name, number FROM aliases WHERE alias = ?1 UNION ALL "
            "SELECT name, MAX(number) FROM variants JOIN versions USING (name) WHERE name = ?1 "
            "GROUP BY name",
            reference,
        )
        return (str(rows[0][0]), int(rows[0][1])) if rows else (reference, 0)

    def _unknown(self, reference: str) -> UnknownVariant:
        known = [
            str(row[0])
            for row in self.database.rows(
                "SELECT name FROM variants UNION SELECT alias FROM aliases ORDER BY 1 LIMIT 9"
            )
        ]
        listing = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        there = f"there are {listing}" if known else "the zoo is empty"
        return UnknownVariant(f"no variant is called {reference!r} in {self.root}: {there}")

    def _manifest(self, table: str, digest: str, kind: type[Manifest]) -> Manifest:
        rows = self.database.rows(f"SELECT manifest FROM {table} WHERE digest = ?", digest)
        if not rows:
            raise DamagedCatalog(f"the catalog of {self.root} has no {digest} among its {table}")
        return _decode(rows[0][0], kind)


def name_taken(name: str) -> NameTaken:
    """The refusal to overwrite a variant."""
    return NameTaken(f"a variant is already called {name!r}: use --replace or another name")


def _is_name(connection: sqlite3.Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM variants WHERE name = ?", (name,))
    return found.fetchone() is not None


def _insert_version(connection: sqlite3.Connection, variant: Variant) -> None:
    manifest = canonical(variant)
    connection.execute(
        "INSERT INTO versions SELECT ?1, COALESCE(MAX(number), 0) + 1, ?2, ?3, ?4, ?5, ?6 "
        "FROM versions WHERE name = ?1",
        (
            variant.name,
            variant.chain,
            variant.source,
            variant.created,
            sha256(manifest),
            manifest,
        ),
    )
    connection.execute(
        "INSERT OR REPLACE INTO variants VALUES (?, ?, ?)", (variant.name, variant.chain, manifest)
    )


def _insert(
    connection: sqlite3.Connection, table: str, manifests: Iterable[tuple[str, object]]
) -> None:
    connection.executemany(
        f"INSERT OR IGNORE INTO {table} VALUES (?, ?)",
        [(digest, canonical(value)) for digest, value in manifests],
    )


def _renamed(variant: Variant, name: str) -> Variant:
    return variant if variant.name == name else msgspec.structs.replace(variant, name=name)


def _decode(data: bytes, kind: type[Manifest]) -> Manifest:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise DamagedCatalog(f"the catalog holds a broken {kind.__name__}: {error}") from error
