"""One chain on its way in: its manifests become resident units and attachments.

Tensors are shared by digest whatever unit they stand in; units and attachments are shared by their
own digests on top of that. The chain need not be in any catalog: manifests are given, and only
their objects are read from the zoo."""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ext.ops import Matrix, Opaque, Ops
from ext.quantize import Bits, coded_bytes, quantize
from workers.block import HeadUnit, ResidentUnit, build_unit
from workers.chains import KvElement, ServedChain, UnservableChain, describe
from workers.holdings import Holdings, Made, Resident
from workers.packer import Packer
from workers.pieces import HeadRows, ResidentAttachment, build_attachment
from workers.weights import Weights, dtype_of
from workers.wire import ChainId, Precision
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    Manifests,
    ObjectDigest,
    Rope,
    Unit,
    UnitDigest,
    attention_of,
    objects_of,
)
from zoo.packed import Form
from zoo.store import ObjectInfo

# Tensors of two axes that are looked up in, not multiplied by.
_TABLES = ("tokens.weight", "positions.weight")
_ELEMENTS: dict[str, KvElement] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class LoadedChain:
    """A chain that is resident: its layout and, per unit, weights, attachment and bytes. `keys` are
    what it holds, to be released when it goes. `weight_error` is that of `wire.Loaded`."""

    chain: ServedChain
    units: tuple[ResidentUnit, ...]
    attachments: tuple[ResidentAttachment | None, ...]
    unit_bytes: tuple[int, ...]
    moved_bytes: int
    chain_bytes: int
    seconds: float
    keys: list[Hashable]
    weight_error: float


@dataclass(frozen=True, slots=True)
class _Coded:
    """A linear layer's weight in codes; the sums of squares of what was lost and of all of it."""

    matrix: Matrix
    lost: float
    norm: float


def load(
    holdings: Holdings,
    weights: Weights,
    chain: ChainId,
    manifests: Manifests,
    packer: Packer | None = None,
) -> LoadedChain:
    """Make a chain resident, its matrices by `packer` where there is one; what fails (ZooError,
    UnservableChain, OSError, MemoryError) leaves nothing behind."""
    began, before = time.perf_counter(), holdings.resident_bytes
    layout = describe(chain, manifests)
    layout.kv = replace(layout.kv, element=_kv_element(holdings, weights, manifests))
    infos = _infos(weights, manifests, holdings)
    holdings.check_room(_sizes(infos, manifests, holdings.precision))
    loading = _Loading(holdings, weights, infos, layout.context, packer)
    try:
        units = tuple(loading.unit(digest, unit) for digest, unit in manifests.units)
        attachments = tuple(
            None if a is None else loading.attachment(a, manifests.units[i], units[i])
            for i, a in enumerate(manifests.attachments)
        )
        if packer is not None:
            packer.settle()
        for key, matrix in loading.packed:
            holdings.weigh(key, matrix.nbytes)
    except BaseException:
        if packer is not None:
            packer.abandon()
        holdings.release(loading.used)
        raise
    layout.vocabulary = _vocabulary(units[-1], attachments[-1])
    return LoadedChain(
        chain=layout,
        units=units,
        attachments=attachments,
        unit_bytes=tuple(holdings.bytes_of([loading.unit_key(d)]) for d, _ in manifests.units),
        moved_bytes=holdings.resident_bytes - before,
        chain_bytes=holdings.bytes_of(loading.used),
        seconds=time.perf_counter() - began,
        keys=loading.used,
        weight_error=_error(holdings.all_of(loading.used, _Coded)),
    )


def time_load(
    ops: Ops, weights: Weights, units: Sequence[tuple[UnitDigest, Unit]], context: int
) -> float:
    """Seconds until units alone are resident; nothing of them stays."""
    began = time.perf_counter()
    loading = _Loading(Holdings(ops), weights, {}, context)
    for digest, unit in units:
        loading.unit(digest, unit)
    return time.perf_counter() - began


def _infos(
    weights: Weights, manifests: Manifests, holdings: Holdings
) -> dict[ObjectDigest, ObjectInfo]:
    """Every tensor of a chain that is not held yet, as stored."""
    held = holdings.digests()
    digests = {d for key, unit in manifests.units if key not in held for d in unit.tensors.values()}
    digests |= {d for a in manifests.attachments if a for d in objects_of(a[1])}
    return {digest: weights.info(digest) for digest in digests - held}


def _kv_element(holdings: Holdings, weights: Weights, manifests: Manifests) -> KvElement:
    """What a chain's pages hold; "auto": the precision of its weights, those of the first layer
    with attention, so that chains which share pages agree."""
    if holdings.kv_dtype != "auto":
        return holdings.kv_dtype
    units = (unit for _, unit in manifests.units if attention_of(unit.spec) is not None)
    tensors = next(units).tensors
    stored = (weights.info(tensors[role]) for role in sorted(tensors))
    return _ELEMENTS.get(next(info.dtype for info in stored if len(info.shape) == 2), "float32")


def _sizes(
    infos: Mapping[ObjectDigest, ObjectInfo], manifests: Manifests, precision: Precision
) -> dict[ObjectDigest, int]:
    """Bytes that every tensor of a chain in `infos` takes in memory, at most."""
    sizes = {digest: info.nbytes for digest, info in infos.items()}
    if precision == "exact":
        return sizes
    tables = {u.tensors[n] for _, u in manifests.units for n in _TABLES if n in u.tensors}
    for _, unit in manifests.units:
        for name, digest in unit.tensors.items():
            if digest in infos and len(infos[digest].shape) == 2 and name not in _TABLES:
                coded = coded_bytes(infos[digest].shape, _bits(precision, name))
                # A tied table is kept as it is, too: tokens are looked up in it.
                sizes[digest] = coded + (infos[digest].nbytes if digest in tables else 0)
    return sizes


def _bits(precision: Bits, name: str) -> Bits:
    """The head is what a few bits harm most: it keeps 8."""
    return "int8" if name == "head.weight" else precision


def _error(coded: Sequence[_Coded]) -> float:
    norm = sum(one.norm for one in coded)
    return math.sqrt(sum(one.lost for one in coded) / norm) if norm else 0.0


def _vocabulary(head: ResidentUnit, attachment: ResidentAttachment | None) -> int:
    """How many logits a chain has: the head's own, and those of tokens added to it."""
    if not isinstance(head, HeadUnit):
        raise UnservableChain("the chain does not end in a head")
    rows = attachment and attachment.one(HeadRows, "head")
    return max(head.output.weight.out_features, rows.width if rows else 0)


class _Loading:
    """The loaders that `workers.block` calls; remembers what is held in `used`."""

    def __init__(
        self,
        holdings: Holdings,
        weights: Weights,
        infos: dict[ObjectDigest, ObjectInfo],
        context: int,
        packer: Packer | None = None,
    ) -> None:
        self._holdings = holdings
        self._packer = packer
        self._weights = weights
        self._infos = infos
        self._context = context
        self.ops: Ops = holdings.ops
        self.used: list[Hashable] = []
        self.packed: list[tuple[Hashable, Matrix]] = []  # whose size is known once they are there
        self._parts = self.used

    def unit_key(self, unit: UnitDigest) -> Hashable:
        """A unit is made for a context: its rotary table ends there."""
        return ("unit", unit, self._context)

    def unit(self, digest: UnitDigest, unit: Unit) -> ResidentUnit:
        return self._compose(self.unit_key(digest), lambda: build_unit(unit, self))

    def attachment(
        self,
        named: tuple[AttachmentDigest, Attachment],
        upon: tuple[UnitDigest, Unit],
        resident: ResidentUnit,
    ) -> ResidentAttachment:
        key = ("attachment", named[0], upon[0])
        return self._compose(key, lambda: build_attachment(named[1], upon[1], resident, self))

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

        value = self._holdings.hold(key, make)
        self.used.append(key)
        return value

    def _part(self, key: Hashable, make: Callable[[], Made]) -> Resident:
        value = self._holdings.hold(key, make)
        self._parts.append(key)
        return value

    def shape(self, digest: ObjectDigest) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._info(digest).shape

    def _info(self, digest: ObjectDigest) -> ObjectInfo:
        if digest not in self._infos:
            self._infos[digest] = self._weights.info(digest)
        return self._infos[digest]

    def matrix(self, digest: ObjectDigest, transposed: bool) -> Matrix:
        """A resident weight, shared by every unit that has this tensor."""

        def make() -> Made:
            matrix = self._holdings.recall(key) or self._matrix(Form(digest, transposed))
            self.packed.append((key, matrix))
            return matrix, matrix.nbytes, []

        key = ("matrix", digest, transposed)
        return self._part(key, make)

    def _matrix(self, form: Form) -> Matrix:
        info = self._info(form.digest)
        dtype = dtype_of(form.digest, info.dtype)
        if self._packer is None or len(info.shape) != 2 or not dtype.is_floating_point:
            return self.ops.matrix(self.tensor(form.digest), transposed=form.turned)
        out, width = reversed(info.shape) if form.turned else info.shape
        return self._packer.matrix(form, (out, width), dtype, lambda: self.tensor(form.digest))

    def weight(self, name: str, digest: ObjectDigest, transposed: bool) -> Matrix:
        """A linear layer's weight, which its unit calls `name`: in codes, if they are wanted."""
        precision = self._holdings.precision
        if precision == "exact":
            return self.matrix(digest, transposed)
        bits = _bits(precision, name)

        def make() -> Made:
            tensor = self.tensor(digest)
            coded = quantize(tensor.t() if transposed else tensor, bits)
            matrix = self.ops.coded(coded)
            return _Coded(matrix, coded.lost, coded.norm), matrix.nbytes, []

        return self._part(("codes", digest, transposed, bits), make).matrix

    def vector(self, digest: ObjectDigest, offset: float) -> Tensor:
        """A norm weight (plus its family's offset), a bias or a gain."""

        def make() -> Made:
            vector = self.ops.vector(self.tensor(digest))
            if offset:
                vector += offset
            return _with_bytes(vector)

        return self._part(("vector", digest, offset), make)

    def factor(self, digest: ObjectDigest) -> Tensor:
        """A low-rank matrix."""
        return self._part(
            ("factor", digest), lambda: _with_bytes(self.ops.factor(self.tensor(digest)))
        )

    def ids(self, digest: ObjectDigest) -> Tensor:
        """Token ids, int64 in host memory, ascending."""

        def make() -> Made:
            stored = self._weights.tensor(digest)
            if stored.dtype is not torch.int64 or stored.dim() != 1 or len(stored) == 0:
                raise UnservableChain(f"tensor {digest} is no list of token ids")
            ids = stored.cpu().clone()
            if int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
                raise UnservableChain(f"the token ids of tensor {digest} do not ascend from 0")
            return _with_bytes(ids)

        return self._part(("ids", digest), make)

    def rotary(self, rope: Rope) -> Opaque:
        """The rotary table of these frequencies up to the chain's context."""

        def make() -> Made:
            made = self.ops.rotary(
                rope.inverse_frequencies, rope.attention_factor, rope.interleaved, self._context
            )
            return made, 0, []

        return self._part(("rotary", rope, self._context), make)

    def tensor(self, digest: ObjectDigest) -> Tensor:
        """A float tensor as it is given; whoever keeps it makes a copy."""
        tensor = self._weights.tensor(digest)
        if not tensor.is_floating_point():
            raise UnservableChain(f"tensor {digest} is of dtype {tensor.dtype}, not a float")
        return tensor


def _with_bytes(tensor: Tensor) -> Made:
    return tensor, tensor.numel() * tensor.element_size(), []
