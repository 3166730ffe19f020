"""What of a source lies in the store: every tensor and file of it, written and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from zoo.manifest import ObjectDigest
from zoo.progress import Progress
from zoo.sources.weights import SourceTensor
from zoo.store import Store


class Origin(Protocol):
    """A source that was read: a whole model or an adapter."""

    @property
    def source(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...

    @property
    def files(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A variant's name and what of its source lies in the store, under the source's own names."""

    name: str
    source: str
    tensors: Mapping[str, ObjectDigest]
    files: Mapping[str, ObjectDigest]


_ALONE: Mapping[str, ObjectDigest] = MappingProxyType({})


def store_origin(
    store: Store,
    name: str,
    origin: Origin,
    progress: Progress,
    parents: Mapping[str, ObjectDigest] = _ALONE,
) -> Stored:
    """Put every tensor and file of the source into the store, read back and compared there;
    `parents` are the objects that tensors may be kept as differences to."""
    tensors = {
        tensor: store.put_tensor(value.dtype, value.shape, value.data, parents.get(tensor))
        for tensor, value in progress.track(list(origin.tensors.items()), f"storing {name}")
    }
    files = {file: store.put_blob(data) for file, data in origin.files.items()}
    return Stored(name, origin.source, tensors, files)
