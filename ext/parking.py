"""The interface of host memory that matrices may leave a device for: what residency asks of it."""

from collections.abc import Hashable
from typing import Protocol

from ext.ops import Matrix, Opaque


class Parking(Protocol):
    """Host memory for matrices that leave a device, which brings them back faster than their files
    would. Both operations belong within `Ops.loading`."""

    @property
    def recalled(self) -> int:
        """How many came back, so far."""
        ...

    def park(self, key: Hashable, value: Opaque) -> bool:
        """Keep a copy of a matrix under that key, if there can be room; False: nothing is kept."""
        ...

    def recall(self, key: Hashable) -> Matrix | None:
        """The matrix of that key, resident; None if there is no copy any more."""
        ...
