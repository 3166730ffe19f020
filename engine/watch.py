"""The catalog as the engine sees it: what changed since the last look."""

import logging

from engine.events import VariantAppeared, VariantRetired
from engine.state import Cluster
from workers.wire import ChainId
from zoo.catalog import Catalog
from zoo.errors import ZooError

log = logging.getLogger(__name__)


class CatalogWatch:
    """Compares the zoo's catalog with what a cluster serves, whenever the catalog has changed."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._version: int | None = None
        self._last_number = 0

    def changes(self, cluster: Cluster) -> list[VariantAppeared | VariantRetired]:
        """Events that bring the cluster up to the catalog; none while that cannot be read."""
        try:
            version = self._catalog.version()
            if version == self._version:
                return []
            events = self._compare(cluster)
        except ZooError as error:
            if self._version != -1:
                log.warning("the catalog stays as it was: %s", error)
            self._version = -1
            return []
        self._version = version
        return events

    def _compare(self, cluster: Cluster) -> list[VariantAppeared | VariantRetired]:
        variants = {variant.name: variant for variant in self._catalog.served()}
        numbers = dict(cluster.numbers)
        events: list[VariantAppeared | VariantRetired] = [
            VariantRetired(name) for name in cluster.variants if name not in variants
        ]
        for name, variant in variants.items():
            served = cluster.variants.get(name)
            if served is not None and served.variant == variant:
                continue
            units = len(self._catalog.chain(variant.chain).units)
            if variant.chain not in numbers:
                self._last_number += 1
                numbers[variant.chain] = ChainId(self._last_number)
            events.append(VariantAppeared(variant, numbers[variant.chain], variant.chain, units))
        return events
