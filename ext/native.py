"""The native CPU library as Python calls it: loading it, and the records its calls take.

The formats mirror ext/cpu/records.h field by field; every field there is 8 bytes wide. Used by
`ext.cpu` alone.
"""

import ctypes
import os
from struct import Struct

from ext.build import NO_MACHINE, Isa, Unavailable, library, supported
from ext.ops import Norm, Patch

MATRIX = Struct("Qqqq")
PACKING = Struct("QqqqQqq")
PROJECT = tuple(Struct("Qqq qdQQ qq" + "QQQQ" * count) for count in range(9))
EMBED = Struct("QQQQqqdQ")
PLAN = Struct("QQQQqqqq")
ROTARY = Struct("Qqqq")
ATTEND = Struct("QQQQQ qqqqq QQ qdQQ qdQQ dq")
ACTIVATE = Struct("QQQqq")
SELECT = Struct("QqqqQQ")

_SEGMENT = Struct("qqQQqqd")
_PATCH = Struct("qq")
_NORMS = {"rms": 1, "layer": 2}
_NO_NORM = (0, 0.0, 0, 0)
_CALLS = (
    "pack",
    "embed",
    "project",
    "attend",
    "activate",
    "argmax",
    "top_k",
    "log_sum_exp",
)


class Record:
    """A C record that outlives one call, at a fixed address."""

    __slots__ = ("_data", "address")

    def __init__(self, data: bytes) -> None:
        self._data = ctypes.create_string_buffer(data, len(data))
        self.address = ctypes.addressof(self._data)


def choose(isa: Isa | str) -> Isa:
    """The instruction set to use: `isa`; if "auto", BLOCKLLM_ISA or the best this machine runs."""
    if isa == "auto":
        isa = os.environ.get("BLOCKLLM_ISA", "auto")
    found = supported()
    if not found:
        raise Unavailable(NO_MACHINE)
    if isa == "auto":
        return found[0]
    for name in found:
        if name == isa:
            return name
    raise Unavailable(f"this machine does not run {isa} kernels, only {' and '.join(found)}")


def load(isa: Isa) -> ctypes.CDLL:
    """The library for `isa`, built if need be, with its functions' types. Raises Unavailable."""
    path = library(isa, sanitize=os.environ.get("BLOCKLLM_SANITIZE") == "1")
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the CPU kernels cannot be loaded: {error}") from error
    native.blockllm_panel.restype = ctypes.c_int64
    native.blockllm_open.argtypes = (ctypes.c_int64,)
    native.blockllm_open.restype = ctypes.c_void_p
    native.blockllm_close.argtypes = (ctypes.c_void_p,)
    native.blockllm_close.restype = None
    for name in _CALLS:
        function = getattr(native, f"blockllm_{name}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        function.restype = None
    return native


def norm_fields(norm: Norm | None, width: int) -> tuple[int, float, int, int]:
    """The fields of a norm of rows of `width`."""
    if norm is None:
        return _NO_NORM
    if norm.weight.shape[0] != width:
        raise ValueError(f"a norm of {norm.weight.shape[0]} for rows of {width}")
    bias = norm.bias.data_ptr() if norm.bias is not None else 0
    return _NORMS[norm.kind], norm.eps, norm.weight.data_ptr(), bias


def patch_address(patch: Patch | None) -> int:
    """The address of a patch's record, which is made at its first use; 0 where there is none."""
    if patch is None or not patch.segments:
        return 0
    if patch.prepared is None:
        offset, parts = 0, []
        for s in patch.segments:
            rank = len(s.a)
            pointers = (s.a.data_ptr(), s.b.data_ptr())
            parts.append(_SEGMENT.pack(s.first, s.last, *pointers, rank, offset, s.scale))
            offset += (s.last - s.first) * rank
        patch.prepared = Record(_PATCH.pack(len(parts), offset) + b"".join(parts))
    return patch.prepared.address
