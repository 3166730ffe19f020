"""A store whose tensors have a shape and no numbers: filled by `zoo dummy`, read by workers that
are told to make up their weights.

Nothing of a tensor is written. It is named as any other, but by a short key in place of its bytes,
so equal keys are one tensor however many variants share it; the catalog says what shape it has.
Files beside the weights are kept as in any store.
"""

import contextlib
from pathlib import Path

from zoo.catalog import Catalog
from zoo.manifest import ObjectDigest
from zoo.sources.tensorfile import tensor_bytes
from zoo.store import ObjectInfo, Store, tensor_digest


class DummyStore(Store):
    """Answers for every object that the catalog at `root` names, or that was put here."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._infos: dict[ObjectDigest, ObjectInfo] = {}

    def put_tensor(
        self,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview | bytes,
        parent: ObjectDigest | None = None,
    ) -> ObjectDigest:
        """Know a tensor by the key `data`."""
        del parent
        digest = tensor_digest(dtype, shape, data)
        self._infos[digest] = ObjectInfo(dtype, shape, tensor_bytes(dtype, shape))
        return digest

    def info(self, digest: ObjectDigest) -> ObjectInfo:
        """Dtype, shape and size as the catalog has them; raises MissingObject."""
        if digest not in self._infos:
            with contextlib.closing(Catalog(self.root)) as catalog:
                self._infos |= catalog.objects()
        known = self._infos.get(digest)
        return super().info(digest) if known is None else known
