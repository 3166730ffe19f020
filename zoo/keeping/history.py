"""What a name has meant over time: `versions`, as plain records, its --json output too."""

from pathlib import Path

import msgspec

from zoo.catalog import Alias, Catalog
from zoo.errors import UnknownVariant, ZooError
from zoo.keeping.reach import Reach
from zoo.store import Store


class VersionRow(msgspec.Struct, frozen=True):
    """A line of `versions`. `is_current`: the name means it now. `is_there`: it can still be served
    and exported, as `reference`."""

    reference: str
    number: int
    chain: str
    source: str
    created: float
    is_current: bool
    is_there: bool
    aliases: list[str]


def history(root: Path, name: str) -> list[VersionRow]:
    """All versions of a name, oldest first; raises UnknownVariant. A removed name has a history
    too."""
    with Catalog(root).snapshot() as catalog:
        versions = catalog.versions(name)
        if not versions:
            catalog.variant(name)
            raise UnknownVariant(f"{name!r} is no variant's own name: give that of a variant")
        is_named = any(variant.name == name for variant in catalog.variants())
        aliases = [alias for alias in catalog.aliases() if alias.name == name]
        return [
            VersionRow(
                reference=version.reference,
                number=version.number,
                chain=version.chain,
                source=version.source,
                created=version.created,
                is_current=is_named and version is versions[-1],
                is_there=version.is_there and _is_whole(catalog, version.reference),
                aliases=_of(aliases, version.number),
            )
            for version in versions
        ]


def _is_whole(catalog: Catalog, reference: str) -> bool:
    store = Store(catalog.root)
    try:
        footprint = Reach(catalog).footprint(catalog.variant(reference))
    except ZooError:
        return False
    return all(store.has(digest) for digest in footprint.objects)


def _of(aliases: list[Alias], number: int) -> list[str]:
    return [alias.alias for alias in aliases if alias.number == number]
