"""The catalog: which variants exist, and the manifests that say what they are made of.

One SQLite file in write-ahead mode: many readers, one writer (who holds `zoo.lock`), one
transaction per change, and objects are on disk before a transaction names them. Rows of a removed
variant stay until the sweep, so what is being served goes on reading them.
"""

import contextlib
import os
import sqlite3
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from zoo.errors import DamagedCatalog, DiskFull, NameTaken, StoreFailure, UnknownVariant
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
from zoo.store import ObjectInfo

FORMAT = 1
FILE_NAME = "catalog.sqlite"

_SCHEMA = """
CREATE TABLE variants (
    name TEXT PRIMARY KEY, chain TEXT NOT NULL, manifest BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE chains (digest TEXT PRIMARY KEY, manifest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE units (digest TEXT PRIMARY KEY, manifest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE attachments (digest TEXT PRIMARY KEY, manifest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE objects (
    digest TEXT PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, nbytes INTEGER NOT NULL
) WITHOUT ROWID;
"""
_MANIFESTS = ("chains", "units", "attachments")

Manifest = TypeVar("Manifest")


class Publication(msgspec.Struct, frozen=True):
    """All that one `publish` makes known: a variant and every manifest and object it stands on."""

    variant: Variant
    chain: Chain
    units: dict[UnitDigest, Unit]
    attachments: dict[AttachmentDigest, Attachment]
    objects: dict[ObjectDigest, ObjectInfo]


class Catalog:
    """The zoo's catalog. Read-only, it takes a file that does not exist yet for an empty one."""

    def __init__(self, root: Path, *, writable: bool = False) -> None:
        self.root = root
        self.path = root / FILE_NAME
        self._writable = writable
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._generation = 0

    # ---- reading --------------------------------------------------------------------------------

    def variants(self) -> list[Variant]:
        """All variants by name."""
        rows = self._rows("SELECT manifest FROM variants ORDER BY name")
        return [_decode(row[0], Variant) for row in rows]

    def variant(self, name: str) -> Variant:
        """One variant; raises UnknownVariant, which names those there are."""
        rows = self._rows("SELECT manifest FROM variants WHERE name = ?", name)
        if rows:
            return _decode(rows[0][0], Variant)
        known = [
            str(row[0]) for row in self._rows("SELECT name FROM variants ORDER BY name LIMIT 9")
        ]
        listing = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        there = f"there are {listing}" if known else "the zoo is empty"
        raise UnknownVariant(f"no variant is called {name!r} in {self.root}: {there}")

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
        rows = self._rows("SELECT digest, dtype, shape, nbytes FROM objects")
        return {
            ObjectDigest(digest): ObjectInfo(
                dtype, msgspec.json.decode(shape, type=tuple[int, ...]), nbytes
            )
            for digest, dtype, shape, nbytes in rows
        }

    def version(self) -> int:
        """A number that changes whenever another process has changed the catalog; 0 without one."""
        rows = self._rows("PRAGMA data_version")
        return (self._generation << 32) | int(rows[0][0]) if rows else 0

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._file = None

    # ---- writing: the caller holds the writer's lock --------------------------------------------

    def publish(self, publication: Publication, *, replace: bool = False) -> None:
        """Make a variant known, all at once. Raises NameTaken unless `replace`."""
        variant = publication.variant
        with self._transaction() as connection:
            taken = connection.execute(
                "SELECT 1 FROM variants WHERE name = ?", (variant.name,)
            ).fetchone()
            if taken and not replace:
                raise name_taken(variant.name)
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
            connection.execute(
                "INSERT OR REPLACE INTO variants VALUES (?, ?, ?)",
                (variant.name, variant.chain, canonical(variant)),
            )

    def remove(self, name: str) -> Variant:
        """Forget a name; its manifests and objects stay until the sweep. Raises UnknownVariant."""
        variant = self.variant(name)
        with self._transaction() as connection:
            connection.execute("DELETE FROM variants WHERE name = ?", (name,))
        return variant

    def prune(self, reached: Iterable[str]) -> None:
        """Forget every chain, unit, attachment and object whose digest is not among `reached`."""
        keep = set(reached)
        with self._transaction() as connection:
            for table in (*_MANIFESTS, "objects"):
                known = [row[0] for row in connection.execute(f"SELECT digest FROM {table}")]
                connection.executemany(
                    f"DELETE FROM {table} WHERE digest = ?",
                    [(digest,) for digest in known if digest not in keep],
                )

    # ---- the connection -------------------------------------------------------------------------

    def _manifest(self, table: str, digest: str, kind: type[Manifest]) -> Manifest:
        rows = self._rows(f"SELECT manifest FROM {table} WHERE digest = ?", digest)
        if not rows:
            raise DamagedCatalog(f"the catalog of {self.root} has no {digest} among its {table}")
        return _decode(rows[0][0], kind)

    def _rows(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        connection = self._connect()
        if connection is None:
            return []
        try:
            return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DamagedCatalog(f"the catalog {self.path} cannot be read: {error}") from error

    def _connect(self) -> sqlite3.Connection | None:
        """The connection to the file that is there now: it may appear, vanish or be replaced."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            self.close()
            if not self._writable:
                return None
        else:
            if self._connection is not None and self._file == (status.st_dev, status.st_ino):
                return self._connection
            self.close()
        try:
            connection = self._create() if self._writable else self._open("ro")
            user_version = connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise DamagedCatalog(f"the catalog {self.path} cannot be opened: {error}") from error
        if user_version == 0:
            connection.close()
            return None
        if user_version != FORMAT:
            connection.close()
            raise DamagedCatalog(
                f"the catalog {self.path} has format {user_version}, this version reads {FORMAT}: "
                "use the version that wrote it"
            )
        status = os.stat(self.path)
        self._connection, self._file = connection, (status.st_dev, status.st_ino)
        self._generation += 1
        return connection

    def _open(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=30.0,
            isolation_level=None,
            check_same_thread=False,
        )

    def _create(self) -> sqlite3.Connection:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreFailure(f"{self.root} cannot be made: {error.strerror}") from error
        connection = self._open("rwc")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {FORMAT};COMMIT;")
        return connection

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        connection = self._connect()
        if connection is None:
            raise StoreFailure(f"the catalog {self.path} cannot be written")
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DiskFull(f"there is no room for the catalog in {self.root}") from error
            raise StoreFailure(f"the catalog {self.path} cannot be written: {error}") from error


def name_taken(name: str) -> NameTaken:
    """The refusal to overwrite a variant."""
    return NameTaken(f"a variant is already called {name!r}: use --replace or another name")


def _insert(
    connection: sqlite3.Connection, table: str, manifests: Iterable[tuple[str, object]]
) -> None:
    connection.executemany(
        f"INSERT OR IGNORE INTO {table} VALUES (?, ?)",
        [(digest, canonical(value)) for digest, value in manifests],
    )


def _decode(data: bytes, kind: type[Manifest]) -> Manifest:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise DamagedCatalog(f"the catalog holds a broken {kind.__name__}: {error}") from error
