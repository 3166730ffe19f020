"""Findings: what was measured or made of variants, kept in the catalog beside them.

A finding has a kind ("edge", "profile", "stitch", "surrogate"), a key that is unique within its
kind, and a struct. It may name objects, which the sweep then keeps.
"""

import time
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from zoo.catalog import Catalog
from zoo.errors import DamagedCatalog
from zoo.manifest import ObjectDigest, canonical
from zoo.schema import sha256

Finding = TypeVar("Finding")


class Findings:
    """The findings of a catalog; who writes holds the zoo's lock and gives a writable catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._database = catalog.database

    def put(
        self, kind: str, key: str, value: msgspec.Struct, objects: Iterable[ObjectDigest] = ()
    ) -> None:
        """Keep a finding in place of the one of that kind and key, if there is one. Its objects
        must be settled in the store."""
        with self._database.transaction() as connection:
            data = canonical(value)
            connection.execute(
                "INSERT OR REPLACE INTO findings VALUES (?, ?, ?, ?, ?)",
                (kind, key, data, sha256(data), time.time()),
            )
            connection.execute(
                "DELETE FROM finding_objects WHERE kind = ? AND key = ?", (kind, key)
            )
            connection.executemany(
                "INSERT OR IGNORE INTO finding_objects VALUES (?, ?, ?)",
                [(kind, key, digest) for digest in objects],
            )

    def get(self, kind: str, key: str, type: type[Finding]) -> Finding | None:
        """The finding of that kind and key, if there is one."""
        rows = self._database.rows(
            "SELECT value FROM findings WHERE kind = ? AND key = ?", kind, key
        )
        return _decode(rows[0][0], kind, type) if rows else None

    def all(self, kind: str, type: type[Finding]) -> dict[str, Finding]:
        """All findings of a kind, by key."""
        rows = self._database.rows("SELECT key, value FROM findings WHERE kind = ?", kind)
        return {str(key): _decode(value, kind, type) for key, value in rows}

    def remove(self, kind: str, key: str) -> None:
        """Forget a finding, if there is one; its objects stay until the sweep."""
        with self._database.transaction() as connection:
            for table in ("findings", "finding_objects"):
                connection.execute(f"DELETE FROM {table} WHERE kind = ? AND key = ?", (kind, key))

    def objects(self) -> dict[ObjectDigest, list[str]]:
        """Every object that a finding names, and which findings do, as "kind key"."""
        found: dict[ObjectDigest, list[str]] = {}
        for digest, kind, key in self._database.rows(
            "SELECT object, kind, key FROM finding_objects ORDER BY kind, key"
        ):
            found.setdefault(ObjectDigest(str(digest)), []).append(f"{kind} {key}")
        return found


def _decode(data: bytes, kind: str, type: type[Finding]) -> Finding:
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.DecodeError as error:
        raise DamagedCatalog(f"the catalog holds a broken finding of kind {kind}: {error}") from (
            error
        )
