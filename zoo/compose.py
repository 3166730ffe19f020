"""From a source and the digests of what was stored of it to all that the catalog has to know.

Pure but for reading the base's manifests. `zoo.add` calls it between writing and publishing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from zoo.adapters import Adapter, Fit, Ground, Target
from zoo.catalog import Catalog, Publication
from zoo.checkpoint import Checkpoint, UnitSource
from zoo.errors import BadAdapter, BadCheckpoint
from zoo.families.registry import family_named
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    Chain,
    ChainDigest,
    EmbedSpec,
    HeadSpec,
    LowRank,
    ObjectDigest,
    Unit,
    UnitDigest,
    Variant,
    digest,
)
from zoo.sidefiles import borrowed_names
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Stored:
    """A variant's name and what of its source lies in the store, under the source's own names."""

    name: str
    source: str
    tensors: Mapping[str, ObjectDigest]
    files: Mapping[str, ObjectDigest]


def ground_of(store: Store, base: Variant, units: Sequence[Unit]) -> Ground:
    """What an adapter finds when it is put upon `base`."""
    return Ground(
        name=base.name,
        family=family_named(base.family),
        specs=tuple(unit.spec for unit in units),
        shapes=tuple(
            {role: store.info(tensor).shape for role, tensor in unit.tensors.items()}
            for unit in units
        ),
    )


def compose_checkpoint(
    catalog: Catalog,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    stored: Stored,
    base: Variant | None,
) -> tuple[Variant, Chain]:
    """A whole model: a base of its own, or a partial or full fine-tune of `base`."""
    digests = [unit_digest(unit) for unit in units]
    shared = 0
    if base is not None:
        theirs = catalog.chain(base.chain).units
        if len(theirs) != len(digests) or base.hidden != checkpoint.design.embed.hidden:
            raise BadCheckpoint(
                f"{stored.source} was not made from {base.name!r}: they differ in depth or width"
            )
        shared = sum(unit in set(theirs) for unit in digests)
    changed = len(digests) - shared
    chain = Chain(tuple(digests), (None,) * len(digests))
    variant = Variant(
        name=stored.name,
        chain=chain_digest(chain),
        family=checkpoint.family.name,
        kind="base" if base is None else "partial" if shared >= changed else "full",
        store="exact",
        base=base.name if base else None,
        source=stored.source,
        created=time.time(),
        hidden=checkpoint.design.embed.hidden,
        vocabulary=checkpoint.design.head.vocabulary,
        context=checkpoint.design.context,
        dtype=checkpoint.dtype,
        eos=checkpoint.eos,
        files=dict(stored.files),
        tensors=dict(stored.tensors),
        report={"shared": shared, "changed": changed, "attached": 0},
    )
    return (_with_files_of(base, variant) if base else variant), chain


def compose_units(sources: Sequence[UnitSource], tensors: Mapping[str, ObjectDigest]) -> list[Unit]:
    """The units of a whole model."""
    return [
        Unit(source.spec, {role: tensors[name] for role, name in source.names.items()})
        for source in sources
    ]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The units of a variant, and what an adapter attaches to each (nothing: an empty list)."""

    units: list[Unit]
    attachments: list[Attachment | None]


def compose_tuned(
    base_units: Sequence[Unit], fitted: Fit, tensors: Mapping[str, ObjectDigest]
) -> Tuned:
    """Put a fitted adapter's tensors upon its base's units."""
    units = [
        _with_whole(unit, fitted.whole.get(index, {}), tensors, fitted.vocabulary)
        for index, unit in enumerate(base_units)
    ]
    attachments = [
        _attachment(fitted.targets.get(index, ()), tensors) for index in range(len(base_units))
    ]
    return Tuned(units, attachments)


def compose_adapter(
    adapter: Adapter, base: Variant, base_units: Sequence[Unit], tuned: Tuned, stored: Stored
) -> tuple[Variant, Chain]:
    """A LoRA variant of `base`; raises BadAdapter if it changes nothing."""
    attached = sum(attachment is not None for attachment in tuned.attachments)
    shared = sum(unit == theirs for unit, theirs in zip(tuned.units, base_units, strict=True))
    changed = len(base_units) - shared
    if not attached and not changed:
        raise BadAdapter(f"{adapter.source} changes nothing: all its low-rank pieces are zero")
    chain = Chain(
        tuple(unit_digest(unit) for unit in tuned.units),
        tuple(attachment and attachment_digest(attachment) for attachment in tuned.attachments),
    )
    head = tuned.units[-1].spec
    variant = msgspec.structs.replace(
        base,
        name=stored.name,
        chain=chain_digest(chain),
        kind="lora",
        base=base.name,
        source=stored.source,
        created=time.time(),
        vocabulary=head.vocabulary if isinstance(head, HeadSpec) else base.vocabulary,
        files=dict(stored.files),
        tensors=dict(stored.tensors),
        report={"shared": shared, "changed": changed, "attached": attached},
    )
    return _with_files_of(base, variant), chain


def publication_of(store: Store, variant: Variant, chain: Chain, tuned: Tuned) -> Publication:
    """All manifests and objects of a variant, for the catalog."""
    units = tuned.units
    present = [attachment for attachment in tuned.attachments if attachment]
    used = {*variant.files.values(), *variant.tensors.values()}
    used.update(tensor for unit in units for tensor in unit.tensors.values())
    return Publication(
        variant=variant,
        chain=chain,
        units={unit_digest(unit): unit for unit in units},
        attachments={attachment_digest(attachment): attachment for attachment in present},
        objects={used_digest: store.info(used_digest) for used_digest in used},
    )


def unit_digest(unit: Unit) -> UnitDigest:
    """A unit's name."""
    return UnitDigest(digest(unit))


def attachment_digest(attachment: Attachment) -> AttachmentDigest:
    """An attachment's name."""
    return AttachmentDigest(digest(attachment))


def chain_digest(chain: Chain) -> ChainDigest:
    """A chain's name: the root over its units and attachments."""
    return ChainDigest(digest(chain))


def _with_files_of(base: Variant, variant: Variant) -> Variant:
    """The variant, with what it needs for serving and did not bring, such as a tokenizer."""
    borrowed = borrowed_names(set(variant.files), set(base.files))
    return msgspec.structs.replace(
        variant,
        files={name: base.files[name] for name in borrowed} | variant.files,
        borrowed=tuple(sorted(borrowed)),
    )


def _with_whole(
    unit: Unit, whole: Mapping[str, str], tensors: Mapping[str, ObjectDigest], vocabulary: int
) -> Unit:
    if not whole:
        return unit
    spec = unit.spec
    if isinstance(spec, EmbedSpec | HeadSpec):
        spec = msgspec.structs.replace(spec, vocabulary=vocabulary)
    return Unit(spec, unit.tensors | {role: tensors[name] for role, name in whole.items()})


def _attachment(targets: Sequence[Target], tensors: Mapping[str, ObjectDigest]) -> Attachment | None:
    if not targets:
        return None
    return Attachment(
        tuple(
            LowRank(target.role, tensors[target.a], tensors[target.b], target.rank, target.scale)
            for target in sorted(targets, key=lambda target: target.role)
        )
    )
