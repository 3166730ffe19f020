"""The native CPU library as Python calls it: loading it, and the records its calls take.

The formats mirror ext/cpu/records.h field by field; every field there is 8 bytes wide. Used by
`ext.cpu` and `ext.patch`.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from struct import Struct
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ext.build import NO_MACHINE, Isa, Unavailable, library, supported
from ext.ops import Attention, Norm, NormRows, Place
from ext.quantize import Bits

_log = logging.getLogger(__name__)

MATRIX = Struct("Qqqq")
PACKING = Struct("QqqqQqq")
PROJECT = tuple(Struct("Qqq qdQQQq qqqq" + "QQQQ" * count) for count in range(9))
EMBED = Struct("QQQQqqdQ")
PLAN = Struct("QQQQqqqq")
ROTARY = Struct("Qqqq")
ATTEND = Struct("QQQQQq qqqqq QQ qdQQQq qdQQQq dqq")
ACTIVATE = Struct("QQQqq")
ADD_NORM = Struct("QQqq qdQQQq")
SCALE = Struct("Qqq")
GAIN = Struct("qqQ")
DETOURS = Struct("QQq")
DETOUR = Struct("qqQQQQqd")
SPLIT = Struct("Qqqq")
SPLIT_PART = Struct("Qq")
COPY = Struct("QQq")
REPLAY = Struct("q")
REPLAYED = Struct("qQ")
POINTER = Struct("Q")
ARGMAX = Struct("QqqQ")
PATCH = Struct("qqq")
SEGMENT = Struct("qqQqQqqqd")
FINISH = Struct("qqQQ")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FOLDED = (6, 7)  # of bfloat16: in panels, in tiles
CODES: dict[Bits, int] = {"int8": 4, "int4": 5}
PAGES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "tanh": 4, "none": 5}

Replayable = Literal["project", "attend", "activate", "add_norm", "split", "embed", "copy"]
# The numbers of `Operation` in records.h.
OPERATIONS: dict[Replayable, int] = {name: i for i, name in enumerate(get_args(Replayable))}
# Where their records say how many rows there are, or elements of rows; of attention, plans do.
COUNTS: dict[Replayable, int] = {
    "project": 8,
    "activate": 24,
    "add_norm": 16,
    "split": 8,
    "embed": 32,
}

_NORM_RUN = Struct("qqQQ")
_NORMS = {"rms": 1, "layer": 2}
_CALLS = (
    "embed",
    "project",
    "attend",
    "activate",
    "add_norm",
    "scale",
    "detour",
    "split",
    "argmax",
)


class Run(Protocol):
    """Rows [first, last) of a batch."""

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...


class Record:
    """A C record that outlives one call, at a fixed address."""

    __slots__ = ("address", "data")

    def __init__(self, data: bytes) -> None:
        self.data = ctypes.create_string_buffer(data, len(data))
        self.address = ctypes.addressof(self.data)


def load(isa: Isa | str) -> tuple[Isa, ctypes.CDLL]:
    """The kernels for an instruction set, built if need be: `isa`; if "auto", BLOCKLLM_ISA or the
    best that this machine runs and its compiler knows. Raises Unavailable."""
    if isa == "auto":
        isa = os.environ.get("BLOCKLLM_ISA", "auto")
    found = supported()
    if not found:
        raise Unavailable(NO_MACHINE)
    wanted: list[Isa] = [name for name in found if isa in (name, "auto")]
    if not wanted:
        raise Unavailable(f"this machine does not run {isa} kernels, only {' and '.join(found)}")
    for name in wanted[:-1]:
        try:
            return name, _open(name)
        except Unavailable as error:
            _log.warning("%s kernels are not used: %s", name, error)
    return wanted[-1], _open(wanted[-1])


def _open(isa: Isa) -> ctypes.CDLL:
    """The library for `isa`, with its functions' types."""
    path = library(isa, sanitize=os.environ.get("BLOCKLLM_SANITIZE") == "1")
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the CPU kernels cannot be loaded: {error}") from error
    native.blockllm_panel.restype = ctypes.c_int64
    native.blockllm_bf16_storage.argtypes = (ctypes.c_int64,)
    native.blockllm_bf16_storage.restype = ctypes.c_int64
    native.blockllm_rounds.restype = ctypes.c_int64
    native.blockllm_packed_bytes.argtypes = (ctypes.c_int64,) * 3
    native.blockllm_packed_bytes.restype = ctypes.c_int64
    native.blockllm_pack.argtypes = (ctypes.c_char_p,)
    native.blockllm_pack.restype = ctypes.c_int64
    native.blockllm_open.argtypes = (ctypes.c_int64,)
    native.blockllm_open.restype = ctypes.c_void_p
    native.blockllm_close.argtypes = (ctypes.c_void_p,)
    native.blockllm_close.restype = None
    for name in _CALLS:
        function = getattr(native, f"blockllm_{name}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        function.restype = None
    native.blockllm_replay.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    native.blockllm_replay.restype = None
    return native


def move(address: int, record: Record) -> None:
    """Copy a record's bytes to where another one of its kind lies."""
    ctypes.memmove(address, record.address, len(record.data))


def replay(calls: bytes) -> Record:
    """The call that makes these calls again, packed as REPLAYED each."""
    return Record(REPLAY.pack(len(calls) // REPLAYED.size) + calls)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return tensor.data_ptr() if tensor is not None else 0


def check_runs(runs: Sequence[Run], rows: int) -> None:
    """Raises ValueError unless runs are sorted, disjoint, not empty and lie within `rows`."""
    end = 0
    for run in runs:
        if not end <= run.first < run.last <= rows:
            raise ValueError(
                f"rows {run.first} to {run.last} of {rows} are empty, outside or out of order"
            )
        end = run.last


def check_attention(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, how: Attention, at: Place
) -> None:
    """Refuse what would make the kernel read or write beyond what it was given."""
    plan, rotary, pages = at.plan, how.rotary, at.cache.data
    kv_heads, dim = pages.shape[3:]
    rows = plan.num_rows
    if (k is None) != (v is None):
        raise ValueError("keys come with values")
    fits = q is None or (len(q) == rows and q.shape[1] % dim == 0 == q.shape[1] // dim % kv_heads)
    if not fits or any(x is not None and x.shape != (rows, kv_heads * dim) for x in (k, v)):
        q_shape, k_shape, v_shape = (x if x is None else tuple(x.shape) for x in (q, k, v))
        raise ValueError(
            f"q {q_shape}, k {k_shape} and v {v_shape} do not fit"
            f" {rows} rows of {kv_heads} kv heads"
        )
    if pages.dtype not in PAGES:
        raise ValueError(f"pages must be float32 or bfloat16, not {pages.dtype}")
    if at.layer >= plan.num_layers or (
        rotary is not None and plan.num_positions > len(rotary.table)
    ):
        raise ValueError(
            f"layer {at.layer} or position {plan.num_positions - 1} lies beyond what was prepared"
        )


def vector_address(vector: Tensor | None, width: int, what: str) -> int:
    """The address of a resident vector of `width`; 0 for None."""
    if vector is None:
        return 0
    if vector.dtype is not torch.float32 or vector.shape != (width,) or not vector.is_contiguous():
        raise ValueError(f"a {what} of {tuple(vector.shape)} {vector.dtype} for rows of {width}")
    return vector.data_ptr()


class NormRecord:
    """The fields of a norm of `rows` rows of `width`, valid while this lives."""

    __slots__ = ("_runs", "fields")

    def __init__(self, norm: Norm | None, width: int, rows: int) -> None:
        self._runs = None
        if norm is None:
            self.fields = (0, 0.0, 0, 0, 0, 0)
            return
        weight = vector_address(norm.weight, width, "norm")
        bias = vector_address(norm.bias, width, "norm's bias")
        if norm.rows:
            check_runs(norm.rows, rows)
            self._runs = Record(b"".join(_norm_run(run, width) for run in norm.rows))
        runs = self._runs.address if self._runs is not None else 0
        self.fields = (_NORMS[norm.kind], norm.eps, weight, bias, runs, len(norm.rows))


def _norm_run(run: NormRows, width: int) -> bytes:
    weight = vector_address(run.weight, width, "norm")
    bias = vector_address(run.bias, width, "norm's bias")
    return _NORM_RUN.pack(run.first, run.last, weight, bias)
