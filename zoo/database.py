"""The catalog's SQLite file: opened when it is there, followed when it is replaced, written in
transactions.

Write-ahead mode: many readers, one writer, who holds `zoo.lock`. Owned by `zoo.catalog` and by
those who keep tables of their own in it.
"""

import contextlib
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Any

from zoo.errors import DamagedCatalog, DiskFull, StoreFailure
from zoo.schema import FORMAT, bring_up_to_date, format_of, is_readable, shadow

FILE_NAME = "catalog.sqlite"


class Database:
    """One file. Read-only, it takes a file that does not exist yet for an empty one."""

    def __init__(self, root: Path, *, writable: bool) -> None:
        self.root = root
        self.path = root / FILE_NAME
        self._writable = writable
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._generation = 0

    def version(self) -> int:
        """A number that is another one whenever somebody else has changed the file."""
        rows = self.rows("PRAGMA data_version")
        return (self._generation << 32) | int(rows[0][0]) if rows else 0

    def rows(self, statement: str, *values: str | int) -> list[tuple[Any, ...]]:
        """What a query finds; nothing if there is no file. Raises DamagedCatalog."""
        connection = self._connect()
        if connection is None:
            return []
        try:
            return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DamagedCatalog(f"the catalog {self.path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def snapshot(self) -> Generator[None]:
        """Let all queries within see the file as it is now, whatever a writer does meanwhile."""
        connection = self._connect()
        if connection is None:
            yield
            return
        connection.execute("BEGIN")
        try:
            yield
        finally:
            # The file may have been deleted meanwhile, and the connection closed.
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """All or nothing. Raises DiskFull or StoreFailure; the caller holds the writer's lock."""
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

    def check_plain(self) -> None:
        """Refuse a file of others that has more in it than tables, before its tables are read."""
        odd = self.rows(
            "SELECT name FROM sqlite_master WHERE sql IS NOT NULL "
            "AND (type <> 'table' OR sql NOT LIKE 'CREATE TABLE%')"
        )
        if odd:
            raise DamagedCatalog(f"the catalog {self.path} has {odd[0][0]!r}, which is no table")

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._file = None

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
            found = self._check(connection)
        except sqlite3.Error as error:
            raise DamagedCatalog(f"the catalog {self.path} cannot be opened: {error}") from error
        if found == 0:
            connection.close()
            return None
        self._generation += 1
        self._connection = connection
        if found == FORMAT:
            status = os.stat(self.path)
            self._file = (status.st_dev, status.st_ino)
        return connection

    def _check(self, connection: sqlite3.Connection) -> int:
        """The file's format. One of the first format is opened anew for each query, because a
        writer may bring it up to date in between."""
        found = format_of(connection)
        if found and not is_readable(connection):
            connection.close()
            raise DamagedCatalog(
                f"the catalog {self.path} has format {found}, this version reads {FORMAT}: "
                "use the version that wrote it, or add its variants to a new zoo"
            )
        if found == 1:
            shadow(connection)
        return found

    def _open(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=30.0,
            isolation_level=None,
            check_same_thread=False,
        )
        # A catalog may be another's: nothing in its schema may call functions.
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection

    def _create(self) -> sqlite3.Connection:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreFailure(f"{self.root} cannot be made: {error.strerror}") from error
        connection = self._open("rwc")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if format_of(connection) == 0 or (format_of(connection) == 1 and is_readable(connection)):
            bring_up_to_date(connection)
        return connection
