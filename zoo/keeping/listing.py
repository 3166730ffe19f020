"""What the listing commands say, as plain records: also the documented form of their --json
output."""

from collections import Counter
from pathlib import Path

import msgspec

from zoo.catalog import FILE_NAME, Catalog
from zoo.families.registry import is_native
from zoo.keeping.reach import Footprint, Reach
from zoo.manifest import AttachmentDigest, ObjectDigest, UnitDigest, Variant, digest
from zoo.partition import cut, partition
from zoo.store import Store


class VariantRow(msgspec.Struct, frozen=True):
    """A line of `list`: a variant, or an alias that stays with an older version. `reference` is the
    version, NAME@N; `aliases` are those that mean the same. Bytes count tensors, as large as they
    are served, and files: `own_bytes` those that no other line uses, `shared_bytes` the rest.
    `units` and `blocks` count those of its chain; `shared`, `changed` and `attached` are units:
    equal to the base's, different from it, and with an attachment. `is_native`: all its arithmetic
    is ours; else its layers run through transformers'."""

    name: str
    reference: str
    aliases: list[str]
    kind: str
    base: str | None
    family: str
    is_native: bool
    dtype: str
    context: int
    units: int
    blocks: int
    shared: int
    changed: int
    attached: int
    own_bytes: int
    shared_bytes: int
    source: str
    created: float


class UnitRow(msgspec.Struct, frozen=True):
    """A unit of a chain in `show`: what it is, the attachment upon it and the kinds of its pieces,
    who else uses the unit."""

    index: int
    kind: str
    digest: str
    bytes: int
    attachment: str | None
    pieces: list[str]
    variants: list[str]


class VariantDetail(msgspec.Struct, frozen=True):
    """`show`: the line of `list`, and what the variant is made of."""

    variant: VariantRow
    chain: str
    vocabulary: int
    hidden: int
    eos: list[int]
    store: str
    files: list[str]
    golden: float | None
    chain_units: list[UnitRow]


class BlockRow(msgspec.Struct, frozen=True):
    """A line of `blocks`: units [first, last) of the chains that use it; bytes of distinct
    tensors."""

    digest: str
    first: int
    last: int
    units: int
    bytes: int
    variants: list[str]


class Stats(msgspec.Struct, frozen=True):
    """`stats`. `disk_bytes` are all objects' files, `catalog_bytes` the catalog's. `tensor_bytes`
    are the distinct tensors that variants need, `serving_bytes` those of them that serving loads.
    `source_bytes` sums the tensors of all sources as they were added, `model_bytes` what the
    variants would take as whole models of their own. `ratio` is source_bytes / disk_bytes."""

    variants: int
    units: int
    blocks: int
    objects: int
    disk_bytes: int
    catalog_bytes: int
    tensor_bytes: int
    serving_bytes: int
    source_bytes: int
    model_bytes: int
    ratio: float
    by_variant: list[VariantRow]


class _Versions:
    """Which version each name and each alias means."""

    def __init__(self, catalog: Catalog) -> None:
        newest = {version.name: version.reference for version in catalog.versions()}
        self._of = {variant.name: newest[variant.name] for variant in catalog.variants()}
        self._aliases = {alias.alias: alias.reference for alias in catalog.aliases()}

    def distinct(self, served: list[Variant]) -> list[Variant]:
        """What is served, without aliases of what has a line already."""
        lines: dict[str, Variant] = {}
        for variant in served:
            lines.setdefault(self.reference(variant.name), variant)
        return sorted(lines.values(), key=lambda variant: variant.name)

    def reference(self, name: str) -> str:
        """The version that a name, an alias or NAME@N means."""
        return self._of.get(name) or self._aliases.get(name, name)

    def aliases(self, name: str) -> list[str]:
        """The aliases, other than `name` itself, of the version that it means."""
        same = self.reference(name)
        return [alias for alias, of in self._aliases.items() if of == same and alias != name]


class Listing:
    """One consistent look at a zoo. Made by the command line; reads everything once."""

    def __init__(self, root: Path, also: str | None = None) -> None:
        """`also` is something to look at that is not served, such as an older version."""
        with Catalog(root).snapshot() as catalog:
            self._versions = _Versions(catalog)
            more = [] if also is None else [catalog.variant(also)]
            self.variants = self._versions.distinct([*catalog.served(), *more])
            self._reach = Reach(catalog)
            self._sizes = {key: info.nbytes for key, info in catalog.objects().items()}
            self._prints = {
                variant.name: self._reach.footprint(variant) for variant in self.variants
            }
        self._root = root
        self._blocks = partition(footprint.chain.units for footprint in self._prints.values())
        self._users = Counter(
            key for footprint in self._prints.values() for key in footprint.objects
        )
        self._names: dict[UnitDigest, list[str]] = {}
        for name, footprint in self._prints.items():
            for unit in set(footprint.chain.units):
                self._names.setdefault(unit, []).append(name)

    def rows(self) -> list[VariantRow]:
        """All variants by name."""
        return [self._row(variant, self._prints[variant.name]) for variant in self.variants]

    def detail(self, name: str) -> VariantDetail:
        """Everything about one variant that this look was taken at."""
        wanted = self._versions.reference(name)
        variant = next(one for one in self.variants if self._versions.reference(one.name) == wanted)
        footprint = self._prints[variant.name]
        chain = footprint.chain
        units = [
            UnitRow(
                index=index,
                kind=type(self._reach.unit(unit).spec).__name__.removesuffix("Spec").lower(),
                digest=unit,
                bytes=self._bytes(self._reach.tensors([unit])),
                attachment=attachment,
                pieces=self._pieces(attachment),
                variants=self._names[unit],
            )
            for index, (unit, attachment) in enumerate(
                zip(chain.units, chain.attachments, strict=True)
            )
        ]
        return VariantDetail(
            variant=self._row(variant, footprint),
            chain=variant.chain,
            vocabulary=variant.vocabulary,
            hidden=variant.hidden,
            eos=list(variant.eos),
            store=variant.store,
            files=sorted(variant.files),
            golden=variant.golden,
            chain_units=units,
        )

    def _pieces(self, attachment: AttachmentDigest | None) -> list[str]:
        """The kinds of an attachment's pieces, each once."""
        if attachment is None:
            return []
        pieces = self._reach.attachment(attachment).pieces
        return sorted({str(piece.__struct_config__.tag) for piece in pieces})

    def blocks(self) -> list[BlockRow]:
        """All blocks, in the order in which chains use them."""
        places: dict[str, tuple[int, int]] = {}
        for footprint in self._prints.values():
            for first, last in cut(footprint.chain.units, self._blocks):
                places.setdefault(footprint.chain.units[first], (first, last))
        return [
            BlockRow(
                digest=digest(block),
                first=places[block[0]][0],
                last=places[block[0]][1],
                units=len(block),
                bytes=self._bytes(self._reach.tensors(block)),
                variants=self._names[block[0]],
            )
            for block in self._blocks
        ]

    def stats(self) -> Stats:
        """The zoo as a whole."""
        store = Store(self._root)
        disk = store.disk_bytes()
        prints = self._prints.values()
        serving = {key for footprint in prints for key in footprint.tensors}
        source = sum(self._sizes[key] for one in self.variants for key in one.tensors.values())
        kept = serving.union(*(variant.tensors.values() for variant in self.variants))
        return Stats(
            variants=len(self.variants),
            units=len({unit for footprint in prints for unit in footprint.chain.units}),
            blocks=len(self._blocks),
            objects=sum(1 for _ in store.digests()),
            disk_bytes=disk,
            catalog_bytes=sum(path.stat().st_size for path in self._root.glob(f"{FILE_NAME}*")),
            tensor_bytes=self._bytes(kept),
            serving_bytes=self._bytes(serving),
            source_bytes=source,
            model_bytes=sum(self._bytes(footprint.tensors) for footprint in prints),
            ratio=source / disk if disk else 0.0,
            by_variant=self.rows(),
        )

    def _row(self, variant: Variant, footprint: Footprint) -> VariantRow:
        own = {key for key in footprint.objects if self._users[key] == 1}
        units = footprint.chain.units
        return VariantRow(
            name=variant.name,
            reference=self._versions.reference(variant.name),
            aliases=self._versions.aliases(variant.name),
            kind=variant.kind,
            base=variant.base,
            family=variant.family,
            is_native=is_native(variant.family),
            dtype=variant.dtype,
            context=variant.context,
            units=len(units),
            blocks=len(cut(units, self._blocks)),
            shared=variant.report["shared"],
            changed=variant.report["changed"],
            attached=variant.report["attached"],
            own_bytes=self._bytes(own),
            shared_bytes=self._bytes(footprint.objects - own),
            source=variant.source,
            created=variant.created,
        )

    def _bytes(self, objects: set[ObjectDigest] | frozenset[ObjectDigest]) -> int:
        return sum(self._sizes[key] for key in objects)
