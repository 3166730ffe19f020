"""What is resident on a worker's device: every distinct tensor once, counted by its users.

A loader thread makes chains resident and frees them, so that serving goes on meanwhile; the
worker's loop asks (`load`, `evict`) and collects outcomes (`finished`). Tensors are shared by
digest whatever unit they stand in; units and attachments are shared by their own digests on top of
that."""

import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor

from ext.ops import Matrix, Opaque, Ops
from workers.block import ResidentAttachment, ResidentUnit, build_attachment, build_unit
from workers.chains import ServedChain, UnservableChain, describe
from workers.wire import ChainId, Load
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    ChainDigest,
    ObjectDigest,
    Rope,
    Unit,
    UnitDigest,
    objects_of,
)
from zoo.store import Store

# A unit, an attachment, or a tensor in the kernels' form; with its bytes and the keys of its parts.
Resident: TypeAlias = Any
Made = tuple[Resident, int, list[Hashable]]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedChain:
    """A chain that is resident: its layout and, per unit, weights, attachment and bytes."""

    chain: ServedChain
    units: tuple[ResidentUnit, ...]
    attachments: tuple[ResidentAttachment | None, ...]
    unit_bytes: tuple[int, ...]
    moved_bytes: int
    chain_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A chain that could not be made resident, and why (one sentence)."""

    chain: ChainId
    reason: str


@dataclass(frozen=True, slots=True)
class Eviction:
    """A chain that is gone, and what that freed."""

    chain: ChainId
    freed_bytes: int


Outcome = LoadedChain | LoadFailure | Eviction


@dataclass(eq=False, slots=True)
class _Held:
    """Something resident: its own bytes, what it is made of, and how many users it has."""

    value: Resident
    nbytes: int
    parts: list[Hashable] = field(default_factory=list)
    users: int = 0


class Residency:
    """Weights on one device, up to `limit_bytes` (0: no limit)."""

    def __init__(self, zoo: Path, ops: Ops, limit_bytes: int) -> None:
        self._root = zoo
        self._ops = ops
        self._limit = limit_bytes
        self._held: dict[Hashable, _Held] = {}
        self._chains: dict[ChainId, list[Hashable]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], Outcome] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._pending = 0
        self.resident_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether outcomes are still to come."""
        return self._pending > 0

    def load(self, order: Load) -> None:
        """Make a chain resident; a LoadedChain or LoadFailure will follow."""
        self._pending += 1
        self._jobs.put(lambda: self._load(order))

    def evict(self, chain: ChainId) -> None:
        """Free what only this chain uses; an Eviction will follow."""
        self._pending += 1
        self._jobs.put(lambda: self._evict(chain))

    def finished(self) -> list[Outcome]:
        """Outcomes since the last call."""
        outcomes: list[Outcome] = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        self._pending -= len(outcomes)
        return outcomes

    def stop(self) -> None:
        """End the loader thread once its present job is done."""
        self._jobs.put(None)
        self._thread.join()

    # ---- in the loader thread -------------------------------------------------------------------

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._outcomes.put(job())

    def _load(self, order: Load) -> Outcome:
        began = time.perf_counter()
        before = self.resident_bytes
        loading = _Loading(self, self._root, order.context)
        try:
            chain, units, attachments = loading.run(order)
        except (ZooError, UnservableChain, OSError, MemoryError, KeyError) as error:
            self._release(loading.used)
            return LoadFailure(order.chain, f"the chain cannot be loaded: {error}")
        finally:
            loading.close()
        self._chains[order.chain] = loading.used
        return LoadedChain(
            chain,
            units,
            attachments,
            tuple(self._bytes_of([_unit_key(d, order)]) for d in chain.unit_digests),
            self.resident_bytes - before,
            self._bytes_of(loading.used),
            time.perf_counter() - began,
        )

    def _evict(self, chain: ChainId) -> Outcome:
        before = self.resident_bytes
        self._release(self._chains.pop(chain, []))
        return Eviction(chain, before - self.resident_bytes)

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
    def ops(self) -> Ops:
        return self._ops

    def check_room(self, sizes: Mapping[ObjectDigest, int]) -> None:
        """Refuse tensors (digest -> bytes) of which those not yet held would not fit."""
        held = {key[1] for key in self._held if isinstance(key, tuple)}
        needed = sum(size for digest, size in sizes.items() if digest not in held)
        if self._limit and self.resident_bytes + needed > self._limit:
            left = self._limit - self.resident_bytes
            raise UnservableChain(
                f"its own weights are {needed} bytes and {left} of {self._limit} are left to this "
                "worker: raise --weight-memory-bytes or remove variants"
            )
        available = psutil.virtual_memory().available
        if self._ops.device.type == "cpu" and needed > available:
            raise UnservableChain(
                f"its own weights are {needed} bytes and the machine has {available} left: "
                "remove variants or take a larger machine"
            )

    def _release(self, keys: list[Hashable]) -> None:
        for key in keys:
            held = self._held[key]
            held.users -= 1
            if held.users == 0:
                del self._held[key]
                self.resident_bytes -= held.nbytes
                self._release(held.parts)

    def _bytes_of(self, keys: list[Hashable]) -> int:
        """Bytes of the distinct things under `keys`, parts included."""
        seen: dict[Hashable, int] = {}
        todo = list(keys)
        while todo:
            key = todo.pop()
            if key not in seen:
                seen[key] = self._held[key].nbytes
                todo.extend(self._held[key].parts)
        return sum(seen.values())


class _Loading:
    """One chain on its way in: reads manifests and tensors, remembers what it holds in `used`."""

    def __init__(self, residency: Residency, root: Path, context: int) -> None:
        self._residency = residency
        self._catalog = Catalog(root)
        self._store = Store(root)
        self._context = context
        self.used: list[Hashable] = []
        self._parts = self.used

    def run(
        self, order: Load
    ) -> tuple[ServedChain, tuple[ResidentUnit, ...], tuple[ResidentAttachment | None, ...]]:
        manifest = self._catalog.chain(ChainDigest(order.digest))
        units = [(d, self._catalog.unit(d)) for d in manifest.units]
        attachments = [
            None if d is None else (d, self._catalog.attachment(d)) for d in manifest.attachments
        ]
        if (order.first, order.last) != (0, len(units)):
            raise UnservableChain(
                f"units {order.first} to {order.last} of {len(units)} were asked for, "
                "and this worker serves whole chains"
            )
        chain = describe(order.chain, order.digest, units, attachments, order.context)
        self._residency.check_room(self._sizes(units, attachments))
        resident = tuple(
            self._compose(_unit_key(d, order), lambda u=u: build_unit(u, self)) for d, u in units
        )
        pieces = tuple(
            None
            if a is None
            else self._compose(("attachment", a[0]), lambda a=a: build_attachment(a[1], self))
            for a in attachments
        )
        return chain, resident, pieces

    def _sizes(
        self,
        units: list[tuple[UnitDigest, Unit]],
        attachments: list[tuple[AttachmentDigest, Attachment] | None],
    ) -> dict[ObjectDigest, int]:
        """Stored bytes of every tensor of a chain."""
        digests = {d for _, unit in units for d in unit.tensors.values()}
        digests |= {d for a in attachments if a for d in objects_of(a[1])}
        return {digest: self._store.info(digest).nbytes for digest in digests}

    def close(self) -> None:
        self._catalog.close()

    def _compose(self, key: Hashable, build: Callable[[], Resident]) -> Resident:
        """A unit or attachment, made of parts that are held on its behalf."""

        def make() -> Made:
            parts: list[Hashable] = []
            self._parts = parts
            try:
                return build(), 0, parts
            except BaseException:
                self.used.extend(parts)
                raise
            finally:
                self._parts = self.used

        value = self._residency.hold(key, make)
        self.used.append(key)
        return value

    def _part(self, key: Hashable, make: Callable[[], Made]) -> Resident:
        value = self._residency.hold(key, make)
        self._parts.append(key)
        return value

    # ---- the loaders that `workers.block` calls -------------------------------------------------

    def matrix(self, digest: ObjectDigest, transposed: bool) -> Matrix:
        """A resident weight, shared by every unit that has this tensor."""

        def make() -> Made:
            matrix = self._residency.ops.matrix(self._tensor(digest), transposed=transposed)
            return matrix, matrix.nbytes, []

        return self._part(("matrix", digest, transposed), make)

    def vector(self, digest: ObjectDigest, offset: float) -> Tensor:
        """A norm weight (plus its family's offset), a bias or an adapter's matrix."""

        def make() -> Made:
            vector = self._residency.ops.vector(self._tensor(digest))
            if offset:
                vector += offset
            return vector, vector.numel() * vector.element_size(), []

        return self._part(("vector", digest, offset), make)

    def rotary(self, rope: Rope) -> Opaque:
        """The rotary table of these frequencies up to the chain's context."""

        def make() -> Made:
            made = self._residency.ops.rotary(
                rope.inverse_frequencies, rope.attention_factor, rope.interleaved, self._context
            )
            return made, 0, []

        return self._part(("rotary", rope, self._context), make)

    def _tensor(self, digest: ObjectDigest) -> Tensor:
        """A stored tensor, mapped privately: reading it costs no copy, writing never reaches the
        file."""
        stored = self._store.tensor(digest)
        dtype = _DTYPES.get(stored.dtype)
        if dtype is None:
            raise UnservableChain(f"tensor {digest} is of dtype {stored.dtype}, not a float")
        path = self._store.path(digest)
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return mapped[size - stored.data.nbytes :].view(dtype).view(stored.shape)


def _unit_key(unit: UnitDigest, order: Load) -> Hashable:
    """A unit is made for a context: its rotary table ends there."""
    return ("unit", unit, order.context)
