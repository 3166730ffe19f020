"""A whole checkpoint becomes a variant: a base of its own, or a fine-tune that shares units with
its base."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from zoo.adding.bases import closest, told_base
from zoo.adding.options import AddOptions
from zoo.adding.thin import thin
from zoo.catalog import Catalog, Publication
from zoo.compose import (
    Tuned,
    attachment_digest,
    chain_digest,
    publication_of,
    unit_digest,
    with_files_of,
)
from zoo.errors import BadCheckpoint, BadSource
from zoo.manifest import Chain, ObjectDigest, Unit, Variant
from zoo.progress import Progress
from zoo.sources.checkpoint import Checkpoint, UnitSource, sort_units
from zoo.store import tensor_digest
from zoo.stored import Stored, store_origin
from zoo.zoo import Zoo


def prepare_checkpoint(
    zoo: Zoo, name: str, checkpoint: Checkpoint, options: AddOptions, progress: Progress
) -> Publication:
    """Place everything, then write it, then compose what the catalog has to know."""
    sources = sort_units(checkpoint)
    base = _base_of(zoo, name, checkpoint, sources, options.base)
    parents = _parents(zoo.catalog, base, sources) if base else {}
    if base is None and options.store != "exact":
        raise BadSource(
            f"--store {options.store} stores {name} upon its base, and none was found: "
            "give --base NAME"
        )
    stored = store_origin(zoo.store, name, checkpoint, progress, parents)
    units = compose_units(sources, stored.tensors)
    variant, chain = compose_checkpoint(zoo.catalog, checkpoint, units, stored, base)
    if base is None or options.store == "exact":
        thinned = _thin(zoo.catalog, variant, units, base) if base else None
        variant, chain, tuned = thinned or (variant, chain, Tuned(units, []))
        return publication_of(zoo.store, variant, chain, tuned)
    # What measures brings torch and the workers along.
    from zoo.adding.approximate import Exact, approximate

    names = [source.names for source in sources]
    return approximate(zoo, Exact(variant, units, names, base), options, progress)


def _thin(
    catalog: Catalog, variant: Variant, units: Sequence[Unit], base: Variant
) -> tuple[Variant, Chain, Tuned] | None:
    """The fine-tune upon its base's units, if norms and biases are all that it changed."""
    digests = catalog.chain(base.chain).units
    theirs = [catalog.unit(digest) for digest in digests]
    found = thin(units, theirs)
    if found is None:
        return None
    chain = Chain(digests, tuple(a and attachment_digest(a) for a in found.attachments))
    attached = sum(a is not None for a in found.attachments)
    report = {"shared": len(digests), "changed": 0, "attached": attached}
    variant = msgspec.structs.replace(
        variant, chain=chain_digest(chain), kind=found.kind, report=report
    )
    return variant, chain, Tuned(theirs, found.attachments)


def _base_of(
    zoo: Zoo, name: str, checkpoint: Checkpoint, sources: Sequence[UnitSource], told: str | None
) -> Variant | None:
    """The base that was told, else the variant that shares most units, if one does."""
    if told is not None:
        return told_base(zoo.catalog, told)
    digests = {
        tensor: tensor_digest(value.dtype, value.shape, value.data)
        for tensor, value in checkpoint.tensors.items()
    }
    units = compose_units(sources, digests)
    return closest(zoo.catalog, [unit_digest(unit) for unit in units], name)


def _parents(
    catalog: Catalog, base: Variant, sources: Sequence[UnitSource]
) -> dict[str, ObjectDigest]:
    """The base's tensor in the same unit and role, by the checkpoint's names."""
    theirs = [catalog.unit(digest) for digest in catalog.chain(base.chain).units]
    return {
        name: unit.tensors[role]
        for source, unit in zip(sources, theirs, strict=False)
        for role, name in source.names.items()
        if role in unit.tensors
    }


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
    return (with_files_of(base, variant) if base else variant), chain


def compose_units(sources: Sequence[UnitSource], tensors: Mapping[str, ObjectDigest]) -> list[Unit]:
    """The units of a whole model."""
    return [
        Unit(source.spec, {role: tensors[name] for role, name in source.names.items()})
        for source in sources
    ]
