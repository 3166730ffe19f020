"""A zoo that is open for writing: its catalog and its store, as `zoo.adding.add` hands them on."""

from dataclasses import dataclass

from zoo.catalog import Catalog
from zoo.store import Store


@dataclass(frozen=True, slots=True)
class Zoo:
    """The caller holds the writer's lock."""

    catalog: Catalog
    store: Store
