"""Which variant of the zoo a new one stands upon: as told, as its config says, or as its units
show."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.adapters.adapter import CONFIG_NAME, Adapter
from zoo.catalog import Catalog
from zoo.errors import BadAdapter, BadSource
from zoo.manifest import UnitDigest, Variant

_MADE_HERE = {"surrogate", "stitched"}


def base_of_adapter(catalog: Catalog, adapter: Adapter, told: str | None) -> Variant:
    """The base that was told, else the one that the adapter's config names; raises BadAdapter."""
    if told is not None:
        return told_base(catalog, told)
    wanted = adapter.wanted
    found = [
        variant
        for variant in catalog.variants()
        if wanted and _is_called(variant, wanted) and _is_whole(catalog, variant)
    ]
    if len({variant.chain for variant in found}) == 1:
        return found[0]
    if found:
        names = ", ".join(variant.name for variant in found)
        raise BadAdapter(f"{adapter.source} may stand upon any of {names}: give one as --base NAME")
    named = f"{wanted!r}, which is not in the zoo" if wanted else "no base"
    raise BadAdapter(f"{adapter.source} is an adapter that names {named}: give --base NAME")


def told_base(catalog: Catalog, name: str) -> Variant:
    """A variant that the user named as a base; an adapter cannot be one."""
    base = catalog.variant(name)
    if not _is_whole(catalog, base):
        raise BadSource(f"{name!r} stands itself upon {base.base!r}: give --base {base.base}")
    return base


def closest(catalog: Catalog, units: Sequence[UnitDigest], name: str) -> Variant | None:
    """The variant that has most of these units too, if any; not the one that `name` replaces or
    what stands upon it, nor what was made here of another, which nobody trains on."""
    wanted = set(units)
    best: tuple[int, Variant] | None = None
    known = catalog.variants()
    bases = {variant.name: variant.base for variant in known}
    for variant in sorted(known, key=lambda variant: variant.created):
        made_here = variant.kind in _MADE_HERE
        upon = name in _line_of(variant.name, bases)
        if upon or made_here or not _is_whole(catalog, variant):
            continue
        shared = len(wanted.intersection(catalog.chain(variant.chain).units))
        if shared and (best is None or shared > best[0]):
            best = (shared, variant)
    return best[1] if best else None


def _line_of(name: str, bases: Mapping[str, str | None]) -> list[str]:
    """A variant, its base, the base's base and so on."""
    line: list[str] = []
    at: str | None = name
    while at is not None and at not in line:
        line.append(at)
        at = bases.get(at)
    return line


def _is_whole(catalog: Catalog, variant: Variant) -> bool:
    """Whether it is a model by itself: not an adapter, and nothing is attached to its units."""
    return CONFIG_NAME not in variant.files and not any(catalog.chain(variant.chain).attachments)


def _is_called(variant: Variant, wanted: str) -> bool:
    path = Path(wanted).expanduser()
    resolved = str(path.resolve()) if path.exists() else wanted
    return wanted in {variant.name, variant.source} or resolved == variant.source
