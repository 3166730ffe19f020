"""What a variant stands on: its manifests, and every object that they and its record name."""

from collections.abc import Iterable
from dataclasses import dataclass

from zoo.catalog import Catalog
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    Chain,
    ObjectDigest,
    Unit,
    UnitDigest,
    Variant,
    objects_of,
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """`tensors` are what serving needs, `objects` all that is kept for the variant."""

    chain: Chain
    tensors: frozenset[ObjectDigest]
    objects: frozenset[ObjectDigest]


class Reach:
    """Reads each manifest of a catalog once, however many variants share it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._units: dict[UnitDigest, Unit] = {}
        self._attachments: dict[AttachmentDigest, Attachment] = {}

    def unit(self, digest: UnitDigest) -> Unit:
        """A unit of the catalog."""
        if digest not in self._units:
            self._units[digest] = self._catalog.unit(digest)
        return self._units[digest]

    def attachment(self, digest: AttachmentDigest) -> Attachment:
        """An attachment of the catalog."""
        if digest not in self._attachments:
            self._attachments[digest] = self._catalog.attachment(digest)
        return self._attachments[digest]

    def footprint(self, variant: Variant) -> Footprint:
        """All objects of one variant."""
        chain = self._catalog.chain(variant.chain)
        tensors = self.tensors(chain.units)
        for digest in chain.attachments:
            if digest is not None:
                tensors.update(objects_of(self.attachment(digest)))
        objects = tensors.union(variant.tensors.values(), variant.files.values())
        return Footprint(chain, frozenset(tensors), frozenset(objects))

    def tensors(self, units: Iterable[UnitDigest]) -> set[ObjectDigest]:
        """The distinct tensors of some units."""
        return {tensor for unit in units for tensor in self.unit(unit).tensors.values()}

    def digests(self, variants: Iterable[Variant]) -> set[str]:
        """The digest of every chain, unit, attachment and object that these variants need."""
        reached: set[str] = set()
        for variant in variants:
            footprint = self.footprint(variant)
            reached.add(variant.chain)
            reached.update(footprint.chain.units, footprint.objects)
            reached.update(digest for digest in footprint.chain.attachments if digest)
        return reached
