"""The checkpoint that a delta stands for: its base's matrices with its low-rank pieces added, each
rounded to its own data type. What `export` writes of a variant that is stored so."""

from zoo.catalog import Catalog
from zoo.deltas.delta import merged
from zoo.families.registry import family_named
from zoo.manifest import Variant
from zoo.progress import Progress
from zoo.sources.weights import SourceTensor
from zoo.store import Store


def merged_tensors(
    catalog: Catalog, store: Store, variant: Variant, progress: Progress
) -> dict[str, SourceTensor]:
    """Every tensor of the variant under its checkpoint's name, hashed again before it is used."""
    found: dict[str, SourceTensor] = {}
    for name, digest in progress.track(list(variant.tensors.items()), "merging"):
        store.verify(digest)
        stored = store.tensor(digest)
        data = _merged(catalog, store, variant, name)
        whole = stored.data if data is None else data
        found[name] = SourceTensor(stored.dtype, stored.shape, whole)
    return found


def _merged(catalog: Catalog, store: Store, variant: Variant, name: str) -> memoryview | None:
    chain = catalog.chain(variant.chain)
    family = family_named(variant.family)
    place = family.tensor(name, family.num_layers(len(chain.units)))
    digest = chain.attachments[place.unit] if place else None
    if place is None or digest is None:
        return None
    unit = catalog.unit(chain.units[place.unit])
    return merged(store, unit, catalog.attachment(digest), place.role)
