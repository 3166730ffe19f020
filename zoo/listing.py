"""What the listing commands say, as plain records: also the documented form of their --json
output."""

import contextlib
from collections import Counter
from pathlib import Path

import msgspec

from zoo.catalog import FILE_NAME, Catalog
from zoo.manifest import ObjectDigest, UnitDigest, Variant, digest
from zoo.partition import cut, partition
from zoo.reach import Footprint, Reach
from zoo.store import Store


class VariantRow(msgspec.Struct, frozen=True):
    """A line of `list`. Bytes count stored tensors and files: `own_bytes` those that no other
    variant uses, `shared_bytes` the rest. `units` and `blocks` count those of its chain; `shared`,
    `changed` and `attached` are units: equal to the base's, different from it, and with an
    attachment."""

    name: str
    kind: str
    base: str | None
    family: str
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
    """A unit of a chain in `show`: what it is, whether an attachment stands upon it, who else uses
    it."""

    index: int
    kind: str
    digest: str
    bytes: int
    attachment: str | None
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


class Listing:
    """One consistent look at a zoo. Made by the command line; reads everything once."""

    def __init__(self, root: Path) -> None:
        with contextlib.closing(Catalog(root)) as catalog:
            self.variants = catalog.variants()
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

    def detail(self, variant: Variant) -> VariantDetail:
        """Everything about one variant."""
        footprint = self._prints[variant.name]
        chain = footprint.chain
        units = [
            UnitRow(
                index=index,
                kind=type(self._reach.unit(unit).spec).__name__.removesuffix("Spec").lower(),
                digest=unit,
                bytes=self._bytes(self._reach.tensors([unit])),
                attachment=attachment,
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
            chain_units=units,
        )

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
            kind=variant.kind,
            base=variant.base,
            family=variant.family,
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
