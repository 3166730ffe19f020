"""Chains as values: a variant's manifests, and one chain with some units of another. Pure but for
reading the catalog."""

from collections.abc import Collection

import msgspec

from zoo.catalog import Catalog
from zoo.compose import attachment_digest, chain_digest, unit_digest
from zoo.manifest import (
    Attachment,
    Chain,
    ChainDigest,
    EmbedSpec,
    HeadSpec,
    Manifests,
    ObjectDigest,
    Unit,
    Variant,
    attention_of,
    objects_of,
)


def manifests_of(catalog: Catalog, variant: Variant) -> Manifests:
    """All of a variant's chain."""
    chain = catalog.chain(variant.chain)
    return Manifests(
        units=[(digest, catalog.unit(digest)) for digest in chain.units],
        attachments=[
            None if digest is None else (digest, catalog.attachment(digest))
            for digest in chain.attachments
        ],
        context=variant.context,
    )


def written_out(
    units: Collection[Unit], attachments: Collection[Attachment | None], context: int
) -> Manifests:
    """A chain that no catalog knows yet."""
    return Manifests(
        units=[(unit_digest(unit), unit) for unit in units],
        attachments=[a and (attachment_digest(a), a) for a in attachments],
        context=context,
    )


def bounded(chain: Manifests, context: int) -> Manifests:
    """The same chain for sequences of at most `context` tokens: rotary tables are made for that
    many positions, and chains of one length share them."""
    return msgspec.structs.replace(chain, context=context)


def digest_of(chain: Manifests) -> ChainDigest:
    """The chain's name, whether a catalog knows it or not."""
    return chain_digest(
        Chain(tuple(d for d, _ in chain.units), tuple(a and a[0] for a in chain.attachments))
    )


def tensors_of(chain: Manifests) -> set[ObjectDigest]:
    """Every object that the chain is served from."""
    found = {digest for _, unit in chain.units for digest in unit.tensors.values()}
    return found.union(*(objects_of(a[1]) for a in chain.attachments if a))


def swapped(chain: Manifests, other: Manifests, places: Collection[int]) -> Manifests:
    """`chain` with the units at `places`, and what is attached there, from `other`."""
    return Manifests(
        units=[(other if i in places else chain).units[i] for i in range(len(chain.units))],
        attachments=[
            (other if i in places else chain).attachments[i] for i in range(len(chain.units))
        ],
        context=chain.context,
    )


def differing(chain: Manifests, other: Manifests) -> list[int]:
    """Places where two chains of one length have other units or attachments."""
    return [
        place
        for place, (one, two) in enumerate(zip(_names(chain), _names(other), strict=True))
        if one != two
    ]


def can_swap(chain: Manifests, other: Manifests) -> bool:
    """Whether units of one chain fit into the other: equal depth, kinds, widths, and KV of one
    shape. What a unit computes with (eps, rotary frequencies, windows) it brings along."""
    return len(chain.units) == len(other.units) and all(
        _shape(one) == _shape(two)
        for (_, one), (_, two) in zip(chain.units, other.units, strict=True)
    )


def _names(chain: Manifests) -> list[tuple[str, str | None]]:
    return [
        (unit, attachment and attachment[0])
        for (unit, _), attachment in zip(chain.units, chain.attachments, strict=True)
    ]


def _shape(unit: Unit) -> tuple[object, ...]:
    spec = unit.spec
    attention = attention_of(spec)
    hidden = attention.hidden if attention else getattr(spec, "hidden", 0)
    kv = (attention.kv_heads, attention.head_dim) if attention else ()
    vocabulary = spec.vocabulary if isinstance(spec, EmbedSpec | HeadSpec) else 0
    return (type(spec), hidden, kv, vocabulary)
