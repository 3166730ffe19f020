"""What a device holds: every distinct tensor, unit and attachment once, counted by its users.

Whoever loads chains owns one and uses it from one thread at a time: `workers.residency` in a
worker, `workers.offline` for measurements."""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from ext.memory import host_memory
from ext.ops import Ops
from ext.parking import Parking
from workers.chains import UnservableChain
from workers.wire import KvDtype, Precision
from zoo.manifest import ObjectDigest

# A unit, an attachment, or a tensor in the kernels' form; with its bytes and the keys of its parts.
Resident: TypeAlias = Any
Made = tuple[Resident, int, list[Hashable]]
Kind = TypeVar("Kind")


class NoRoom(UnservableChain):
    """The budget lacks `missing` bytes for a chain."""

    def __init__(self, reason: str, missing: int) -> None:
        super().__init__(reason)
        self.missing = missing


@dataclass(eq=False, slots=True)
class _Held:
    """Something resident: its own bytes, what it is made of, and how many users it has."""

    value: Resident
    nbytes: int
    parts: list[Hashable] = field(default_factory=list)
    users: int = 0


class Holdings:
    """Weights on one device in the form of `ops`, up to `limit_bytes` (0: no limit); those of
    linear layers are kept in `precision`. `kv_dtype` is what pages of their chains hold: "auto" is
    what the kernels multiply, "auto" still where that is what a chain's weights are. `parking` has
    copies of what left and is to come back."""

    def __init__(
        self,
        ops: Ops,
        limit_bytes: int = 0,
        precision: Precision = "exact",
        kv_dtype: KvDtype | Literal["auto"] = "auto",
        parking: Parking | None = None,
    ) -> None:
        self.ops = ops
        self.precision: Precision = precision
        self.kv_dtype: KvDtype | Literal["auto"] = ops.dtype if kv_dtype == "auto" else kv_dtype
        self._limit = limit_bytes
        self._parking = parking
        self._held: dict[Hashable, _Held] = {}
        self.resident_bytes = 0

    def hold(self, key: Hashable, make: Callable[[], Made]) -> Resident:
        """The resident thing of that key, one more user; `make` gives value, bytes and parts."""
        held = self._held.get(key)
        if held is None:
            value, nbytes, parts = make()
            held = self._held[key] = _Held(value, nbytes, parts)
            self.resident_bytes += nbytes
        held.users += 1
        return held.value

    @property
    def recalled(self) -> int:
        """How many weights came back from where they were parked."""
        return self._parking.recalled if self._parking else 0

    def recall(self, key: Hashable) -> Resident | None:
        """What was parked under that key, resident again; None: it has to be made."""
        return self._parking.recall(key) if self._parking else None

    def release(self, keys: list[Hashable], *, park: bool = False) -> None:
        """One user less for each key; what nobody uses any more is freed, with its parts, and
        parked if it is to come back."""
        for key in keys:
            held = self._held[key]
            held.users -= 1
            if held.users == 0:
                del self._held[key]
                self.resident_bytes -= held.nbytes
                if park and self._parking is not None:
                    self._parking.park(key, held.value)
                self.release(held.parts, park=park)

    def weigh(self, key: Hashable, nbytes: int) -> None:
        """Take note of how many bytes something turned out to have."""
        held = self._held[key]
        self.resident_bytes += nbytes - held.nbytes
        held.nbytes = nbytes

    def bytes_of(self, keys: list[Hashable]) -> int:
        """Bytes of the distinct things under `keys`, parts included."""
        return sum(held.nbytes for held in self._under(keys))

    def all_of(self, keys: list[Hashable], kind: type[Kind]) -> list[Kind]:
        """The distinct things of a kind under `keys`, parts included."""
        return [held.value for held in self._under(keys) if isinstance(held.value, kind)]

    def _under(self, keys: list[Hashable]) -> Collection[_Held]:
        seen: dict[Hashable, _Held] = {}
        todo = list(keys)
        while todo:
            key = todo.pop()
            if key not in seen:
                seen[key] = self._held[key]
                todo.extend(self._held[key].parts)
        return seen.values()

    def freed_by(self, keys: list[Hashable]) -> int:
        """Bytes that releasing `keys` would free."""
        gone: dict[Hashable, int] = {}
        freed, todo = 0, list(keys)
        while todo:
            key = todo.pop()
            gone[key] = gone.get(key, 0) + 1
            if gone[key] == self._held[key].users:
                freed += self._held[key].nbytes
                todo.extend(self._held[key].parts)
        return freed

    def digests(self) -> set[Hashable]:
        """What the keys of all that is held name: tensors and units by their digests."""
        return {key[1] for key in self._held if isinstance(key, tuple)}

    def check_room(self, sizes: Mapping[ObjectDigest, int]) -> None:
        """Refuse tensors (digest -> bytes), none of them held yet, that would not fit."""
        needed = sum(sizes.values())
        left = self._limit - self.resident_bytes
        if self._limit and needed > left:
            raise NoRoom(
                f"its own weights are {needed} bytes and {left} of {self._limit} are left to this "
                "worker: raise --weight-memory-bytes or remove variants",
                needed - left,
            )
        available = host_memory().available
        if self.ops.device.type == "cpu" and needed > available:
            raise UnservableChain(
                f"its own weights are {needed} bytes and the machine has {available} left: "
                "remove variants or take a larger machine"
            )
