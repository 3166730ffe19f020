"""From a source and the digests of what was stored of it to all that the catalog has to know.

Pure but for reading the base's manifests. `zoo.adding.add` calls it between writing and publishing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.catalog import Publication
from zoo.errors import BadAdapter
from zoo.families.registry import family_named
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    Chain,
    ChainDigest,
    EmbedSpec,
    HeadSpec,
    ObjectDigest,
    Unit,
    UnitDigest,
    Variant,
    digest,
    objects_of,
    virtual_tokens,
)
from zoo.sources.sidefiles import borrowed_names
from zoo.store import Store
from zoo.stored import Stored


def ground_of(store: Store, base: Variant, units: Sequence[Unit]) -> Ground:
    """What an adapter finds when it is put upon `base`."""
    return Ground(
        name=base.name,
        family=family_named(base.family),
        units=tuple(units),
        shapes=tuple(
            {role: store.info(tensor).shape for role, tensor in unit.tensors.items()}
            for unit in units
        ),
        store=store,
    )


@dataclass(frozen=True, slots=True)
class Tuned:
    """The units of a variant, and what an adapter attaches to each (nothing: an empty list)."""

    units: list[Unit]
    attachments: list[Attachment | None]


def compose_tuned(
    base_units: Sequence[Unit], draft: Draft, tensors: Mapping[str, ObjectDigest]
) -> Tuned:
    """Put a placed adapter's tensors upon its base's units."""
    units = [
        _with_whole(unit, draft.whole.get(index, {}), tensors, draft.vocabulary)
        for index, unit in enumerate(base_units)
    ]
    return Tuned(units, [draft.settle(index, tensors) for index in range(len(base_units))])


def compose_adapter(
    kind: str, base: Variant, base_units: Sequence[Unit], tuned: Tuned, stored: Stored
) -> tuple[Variant, Chain]:
    """A variant of `base`; raises BadAdapter if it changes nothing or leaves no token room."""
    attached = sum(attachment is not None for attachment in tuned.attachments)
    shared = sum(unit == theirs for unit, theirs in zip(tuned.units, base_units, strict=True))
    changed = len(base_units) - shared
    if not attached and not changed:
        raise BadAdapter(f"{stored.source} changes nothing of {base.name!r}: it has no effect")
    context = base.context - virtual_tokens(tuned.attachments)
    if context < 1:
        raise BadAdapter(
            f"{stored.source} puts {base.context - context} virtual tokens before a request, and "
            f"{base.name!r} holds {base.context} in all: none would be left"
        )
    chain = Chain(
        tuple(unit_digest(unit) for unit in tuned.units),
        tuple(attachment and attachment_digest(attachment) for attachment in tuned.attachments),
    )
    head = tuned.units[-1].spec
    report = {"shared": shared, "changed": changed, "attached": attached}
    variant = msgspec.structs.replace(
        variant_upon(base, kind, chain, report, stored),
        context=context,
        vocabulary=head.vocabulary if isinstance(head, HeadSpec) else base.vocabulary,
    )
    return with_files_of(base, variant), chain


def variant_upon(
    base: Variant, kind: str, chain: Chain, report: dict[str, int], stored: Stored
) -> Variant:
    """A variant that is `base` but for its chain and what its source brought; nothing that was
    measured or checked of the base is said of it."""
    return msgspec.structs.replace(
        base,
        name=stored.name,
        chain=chain_digest(chain),
        kind=kind,
        base=base.name,
        source=stored.source,
        created=time.time(),
        store="exact",
        measured=None,
        bound=None,
        golden=None,
        files=dict(stored.files),
        tensors=dict(stored.tensors),
        report=report,
        borrowed=(),
    )


def publication_of(store: Store, variant: Variant, chain: Chain, tuned: Tuned) -> Publication:
    """All manifests and objects of a variant, for the catalog."""
    units = tuned.units
    present = [attachment for attachment in tuned.attachments if attachment]
    used = {*variant.files.values(), *variant.tensors.values()}
    used.update(tensor for unit in units for tensor in unit.tensors.values())
    used.update(tensor for attachment in present for tensor in objects_of(attachment))
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


def with_files_of(base: Variant, variant: Variant) -> Variant:
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
