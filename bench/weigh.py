"""What the variants of a zoo weigh in a computation: the `Weights` of the roofline."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from bench.roofline import Weights
from zoo.catalog import Catalog
from zoo.keeping.listing import Listing
from zoo.manifest import attention_of

_KV_ELEMENT_BYTES = 4
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def weigh(root: Path, base: str, others: Sequence[str] = ()) -> Weights:
    """Weights of a load over `base` and `others`, whose rows come in equal parts. Adapters add to
    what a row computes; own units of a fine-tune take the place of the base's."""
    listing = Listing(root)
    variants = {variant.name: variant for variant in listing.variants}
    detail = listing.detail(base)
    sizes = {"attention": 0, "mlp": 0, "parallel": 0, "head": 0, "embed": 0}
    for unit in detail.chain_units:
        sizes[unit.kind] += unit.bytes
    with closing(Catalog(root)) as catalog:
        specs = [catalog.unit(unit).spec for unit in catalog.chain(variants[base].chain).units]
    attending = [a for a in map(attention_of, specs) if a is not None]
    kv = sum(2 * a.kv_heads * a.head_dim for a in attending)
    weights = Weights(
        body_bytes=sizes["attention"] + sizes["mlp"] + sizes["parallel"],
        head_bytes=sizes["head"],
        element_bytes=_ELEMENT_BYTES[detail.variant.dtype],
        kv_bytes=kv * _KV_ELEMENT_BYTES,
    )
    rows = {row.name: row for row in listing.rows()}
    adapters = [rows[name].own_bytes for name in others if rows[name].kind == "lora"]
    tuned = [rows[name].own_bytes for name in others if rows[name].kind != "lora"]
    return msgspec.structs.replace(
        weights,
        own_bytes=sum(adapters) + sum(tuned),
        own_weights=sum(adapters) / _KV_ELEMENT_BYTES / max(1, len(others)),
    )
