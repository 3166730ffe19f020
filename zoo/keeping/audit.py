"""Which rows of the catalog are not what they were when they were written, and whom that touches.

Manifests are named by their digests, and variants and findings have theirs beside them. Called by
`zoo.keeping.verify` before it believes what the catalog says of objects.
"""

from collections.abc import Iterator

from zoo.catalog import Catalog
from zoo.database import Database
from zoo.errors import DamagedCatalog
from zoo.schema import MANIFESTS, sha256

Flaws = dict[str, list[str]]


def audit(catalog: Catalog) -> Flaws:
    """What is wrong (a manifest's digest, or what a row is of) -> the names that it touches.
    Raises DamagedCatalog if the file is no sound database."""
    database = catalog.database
    soundness = database.rows("PRAGMA integrity_check")
    if soundness and soundness[0][0] != "ok":
        raise DamagedCatalog(f"the catalog {database.path} is damaged: {soundness[0][0]}")
    flaws: Flaws = {}
    for fault, chain in (*_manifests(database), *_missing(database)):
        flaws[fault] = _users(database, fault if chain is None else chain)
    flaws.update((f"{kind} {key}", []) for kind, key in _findings(database))
    flaws.update((reference, [reference]) for reference in _versions(database))
    return flaws


def _manifests(database: Database) -> Iterator[tuple[str, str | None]]:
    for table in MANIFESTS:
        for digest, data in database.rows(f"SELECT digest, manifest FROM {table}"):
            if sha256(data) != digest:
                yield str(digest), None


def _missing(database: Database) -> Iterator[tuple[str, str | None]]:
    """Chains that variants name, and units and attachments that chains name, and that have no
    row."""
    yield from (
        (str(chain), None)
        for (chain,) in database.rows(
            "SELECT chain FROM versions WHERE manifest IS NOT NULL "
            "AND chain NOT IN (SELECT digest FROM chains)"
        )
    )
    for table in ("units", "attachments"):
        yield from (
            (str(part), str(chain))
            for part, chain in database.rows(
                "SELECT part.value, chains.digest FROM chains, "
                f"json_each(CAST(manifest AS TEXT), '$.{table}') AS part "
                "WHERE json_valid(CAST(manifest AS TEXT)) AND part.value IS NOT NULL "
                f"AND part.value NOT IN (SELECT digest FROM {table})"
            )
        )


def _versions(database: Database) -> Iterator[str]:
    for name, number, digest, data in database.rows(
        "SELECT name, number, digest, manifest FROM versions WHERE manifest IS NOT NULL"
    ):
        if sha256(data) != digest:
            yield f"{name}@{number}"
    yield from (
        str(name)
        for (name,) in database.rows(
            "SELECT name FROM variants JOIN versions USING (name) GROUP BY name "
            "HAVING SUM(variants.manifest = versions.manifest) = 0 "
            "UNION SELECT name FROM variants WHERE name NOT IN (SELECT name FROM versions)"
        )
    )
    yield from (
        str(alias)
        for (alias,) in database.rows(
            "SELECT alias FROM aliases LEFT JOIN versions USING (name, number) "
            "WHERE manifest IS NULL"
        )
    )


def _findings(database: Database) -> Iterator[tuple[str, str]]:
    for kind, key, digest, data in database.rows("SELECT kind, key, digest, value FROM findings"):
        if sha256(data) != digest:
            yield str(kind), str(key)


def _users(database: Database, part: str) -> list[str]:
    """The versions whose chain is, or names, a digest."""
    rows = database.rows(
        "SELECT name || '@' || number FROM versions WHERE manifest IS NOT NULL AND (chain = ?1 "
        "OR chain IN (SELECT digest FROM chains WHERE INSTR(CAST(manifest AS TEXT), ?1)))",
        part,
    )
    return [str(name) for (name,) in rows]
