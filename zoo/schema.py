"""The catalog's tables, and how a catalog of an older format becomes one of this format.

`variants` holds what each name means now, `versions` all that it ever meant: `manifest` is NULL
once the sweep has freed what only that version used. `findings` are what was measured or made,
`finding_objects` the objects that they name. `digest` is the SHA-256 of the bytes beside it.
"""

import hashlib
import sqlite3

FORMAT = 2
# Tables of manifests that are named by their digests.
MANIFESTS = ("chains", "units", "attachments")

_FIRST = """
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
_SECOND = """
CREATE {kind} versions (
    name TEXT NOT NULL, number INTEGER NOT NULL, chain TEXT NOT NULL, source TEXT NOT NULL,
    created REAL NOT NULL, digest TEXT NOT NULL, manifest BLOB, PRIMARY KEY (name, number)
) WITHOUT ROWID;
CREATE {kind} aliases (
    alias TEXT PRIMARY KEY, name TEXT NOT NULL, number INTEGER NOT NULL
) WITHOUT ROWID;
CREATE {kind} findings (
    kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, digest TEXT NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE {kind} finding_objects (
    kind TEXT NOT NULL, key TEXT NOT NULL, object TEXT NOT NULL, PRIMARY KEY (kind, key, object)
) WITHOUT ROWID;
INSERT INTO versions
    SELECT name, 1, chain, json_extract(CAST(manifest AS TEXT), '$.source'),
        json_extract(CAST(manifest AS TEXT), '$.created'), sha256(manifest), manifest
    FROM variants;
"""
# What the first format called a LoRA's attachment; its digest would be another one today.
_OLD_ATTACHMENT = 'SELECT 1 FROM attachments WHERE CAST(manifest AS TEXT) LIKE \'{"type":"lora"%\''


def format_of(connection: sqlite3.Connection) -> int:
    """The format of the catalog that is open; 0 for an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def is_readable(connection: sqlite3.Connection) -> bool:
    """Whether this version can read, or bring up to date, the catalog that is open."""
    found = format_of(connection)
    if found == 1:
        return connection.execute(_OLD_ATTACHMENT).fetchone() is None
    return found == FORMAT


def sha256(data: bytes) -> str:
    """The digest of a row's bytes."""
    return hashlib.sha256(data).hexdigest()


def shadow(connection: sqlite3.Connection) -> None:
    """Let a reader of the first format find the tables that it lacks, for as long as it is open."""
    connection.create_function("sha256", 1, sha256, deterministic=True)
    connection.executescript(_SECOND.format(kind="TEMP TABLE"))


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Make what the catalog lacks of this format, in one transaction."""
    connection.create_function("sha256", 1, sha256, deterministic=True)
    connection.execute("BEGIN IMMEDIATE")
    try:
        missing = {0: _FIRST + _SECOND, 1: _SECOND}.get(format_of(connection), "")
        for statement in missing.format(kind="TABLE").split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
