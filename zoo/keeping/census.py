"""What each variant of a zoo keeps in memory, read from the catalog alone, for `fit`."""

from dataclasses import dataclass
from pathlib import Path

from zoo.catalog import Catalog
from zoo.keeping.fit import Resident
from zoo.keeping.reach import Reach
from zoo.manifest import ObjectDigest, Unit, attention_of


@dataclass(frozen=True, slots=True)
class Census:
    """All that is served, the bytes of every tensor, and the longest context that is offered."""

    residents: list[Resident]
    sizes: dict[ObjectDigest, int]
    context: int


def census(root: Path, element_bytes: int) -> Census:
    """Every variant, and every alias that stays with an older version; `element_bytes` are those of
    one number of a key or value."""
    with Catalog(root).snapshot() as catalog:
        reach = Reach(catalog)
        served = {variant.chain: variant for variant in reversed(catalog.served())}
        residents: list[Resident] = []
        for variant in served.values():
            footprint = reach.footprint(variant)
            per_token = sum(
                kv_bytes(reach.unit(unit), element_bytes) for unit in footprint.chain.units
            )
            residents.append(Resident(variant.name, footprint.tensors, per_token))
        sizes = {digest: info.nbytes for digest, info in catalog.objects().items()}
        context = max((variant.context for variant in served.values()), default=0)
    return Census(residents, sizes, context)


def weigh(root: Path) -> int:
    """Bytes of the distinct tensors of all that is served. Raises ZooError."""
    counted = census(root, 0)
    tensors = {digest for resident in counted.residents for digest in resident.tensors}
    return sum(counted.sizes[digest] for digest in tensors)


def kv_bytes(unit: Unit, element_bytes: int) -> int:
    """Bytes of keys and values that a unit keeps per position."""
    attention = attention_of(unit.spec)
    return 2 * attention.kv_heads * attention.head_dim * element_bytes if attention else 0
