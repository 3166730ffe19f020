"""Native CPU operations: the kernels of ext/cpu behind the interface `ext.ops.Ops`.

Weights stay in their stored 2 or 4 bytes, or are codes of 8 or 4 bits, repacked into panels;
activations and sums are float32. A row's results have the same bits whatever other rows share its
batch, and whatever the number of threads. Each operation packs one record (`ext.native`) and makes
one foreign call, which releases the interpreter's lock.
"""

import ctypes
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.build import Isa
from ext.memory import keep_freed, reserve
from ext.native import ACTIVATIONS, STORAGE, NormRecord, address
from ext.ops import (
    Activation,
    Attention,
    Detour,
    Dtype,
    Geometry,
    Linear,
    Norm,
    Patch,
    Place,
    RowGain,
)
from ext.packing import CpuMatrix, Packing
from ext.patch import patch_address
from ext.plan import CpuPlan, prepare
from ext.quantize import Quantized
from ext.rotary import CpuRotary, tabulate
from ext.tape import Tape, Workspace

_STORE, _ADD, _GATE, _BEST = range(4)


class CpuOps:
    """See `ext.ops.Ops`. `threads` 0: as many as torch uses; `isa` "auto": the best of the machine.

    With `rounding`, layers may round to bfloat16 what they multiply (inputs, low-rank factors,
    queries, softmax weights), where that is faster; sums stay float32. Raises Unavailable where the
    kernels cannot be built or run. Calls may come from several Python threads; they take turns.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, threads: int = 0, isa: Isa | str = "auto", rounding: bool = False) -> None:
        self.isa: Isa
        self.isa, self._native = native.load(isa)
        keep_freed()
        self.rounding = rounding
        self._rounds = rounding and self._native.blockllm_rounds() == 1
        self.dtype: Dtype = "bfloat16" if rounding else "float32"
        self.threads = threads or torch.get_num_threads()
        self._pool = ctypes.c_void_p(self._native.blockllm_open(self.threads))
        weakref.finalize(self, self._native.blockllm_close, self._pool)
        self.packing = Packing(self._native, self.isa, rounding)
        self._tape: Tape | None = None

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        """Nothing: every operation is done when it returns."""

    def matrix(self, weight: Tensor, *, transposed: bool = False) -> CpuMatrix:
        return self.packing.matrix(weight.t() if transposed else weight)

    def coded(self, weight: Quantized) -> CpuMatrix:
        return self.packing.coded(weight)

    def vector(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def factor(self, weight: Tensor) -> Tensor:
        rounds = self._rounds and weight.dtype is torch.float32
        return self.packing.factor(weight.bfloat16() if rounds else weight)

    def rotary(
        self, inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
    ) -> CpuRotary:
        return tabulate(inverse_frequencies, factor, interleaved, positions)

    def memory(self, nbytes: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(reserve(nbytes), np.uint8, nbytes))

    def indices(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.int64, copy=False))

    def plan(self, geometry: Geometry, last: CpuPlan | None = None) -> CpuPlan:
        return prepare(geometry, last)

    @contextmanager
    def taped(self, workspace: Workspace, most: int) -> Iterator[Tape]:
        """Note the calls of a step that this thread runs within; its results lie in `workspace`,
        with room for `most` rows."""
        assert self._tape is None, "a tape is running"
        self._tape = tape = Tape(workspace, most)
        try:
            yield tape
        finally:
            self._tape = None

    def replay(self, call: native.Record) -> None:
        """Make noted calls again."""
        self._native.blockllm_replay(self._pool, call.address)

    def _call(self, operation: native.Replayable, record: bytes) -> None:
        """Make a call of a step."""
        getattr(self._native, f"blockllm_{operation}")(self._pool, record)
        if self._tape is not None:
            self._tape.note(operation, record)

    def _empty(self, *shape: int) -> Tensor:
        """Memory for a result of a step."""
        return torch.empty(shape) if self._tape is None else self._tape.empty(*shape)

    def embed(
        self,
        tokens: np.ndarray,
        table: CpuMatrix,
        scale: float,
        positions: CpuMatrix | None,
        plan: CpuPlan,
        offset: int,
    ) -> Tensor:
        tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        if len(tokens) != plan.num_rows:
            raise ValueError(f"{len(tokens)} tokens for {plan.num_rows} rows")
        out = self._empty(len(tokens), table.in_features)
        if len(tokens) == 0:
            return out
        if table.is_coded or (positions is not None and positions.is_coded):
            raise ValueError("embeddings cannot be looked up in codes")
        if self._tape is None and not 0 <= tokens.min() <= tokens.max() < table.out_features:
            raise ValueError(f"a token lies outside the vocabulary of {table.out_features}")
        if positions is not None:
            known = positions.out_features
            if plan.num_positions + offset > known:
                raise ValueError(f"a position lies beyond the {known} of the model")
            if self._tape is not None:
                self._tape.note_bounds(0, known - offset)
        record = native.EMBED.pack(
            table.record.address,
            positions.record.address if positions is not None else 0,
            tokens.ctypes.data,
            plan.record.address,
            len(tokens),
            offset,
            scale,
            out.data_ptr(),
        )
        self._call("embed", record)
        return out

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        rows = len(x)
        outs = [self._empty(rows, linear.weight.out_features) for linear in linears]
        self._project(_plain(x), norm, linears, patches, outs, (_STORE, 0))
        return outs

    def project_gated(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        kind: Activation,
    ) -> Tensor:
        gate, up = (linear.weight.out_features for linear in linears)
        if gate != up:
            raise ValueError(f"a gate of {gate} outputs for {up}")
        out = self._empty(len(x), up)
        mode = (_GATE, ACTIVATIONS[kind])
        self._project(_plain(x), norm, linears, patches, (None, out), mode)
        return out

    def best(self, x: Tensor, norm: Norm | None, linear: Linear, patch: Patch | None) -> Tensor:
        rows = len(x)
        ids = torch.empty(rows, dtype=torch.int64) if self._tape is None else self._tape.best(rows)
        self._project(_plain(x), norm, (linear,), (patch,), (ids,), (_BEST, 0))
        return ids

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        if x.shape != (len(y), linear.weight.out_features):
            raise ValueError(
                f"{tuple(x.shape)} cannot take {len(y)} x {linear.weight.out_features} results"
            )
        target = _plain(x)
        self._project(_plain(y), None, (linear,), (patch,), (target,), (_ADD, 0))
        _give_back(target, x)

    def _project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        outs: Sequence[Tensor | None],
        mode: tuple[int, int],
    ) -> None:
        rows, width = x.shape
        if rows == 0 or not linears:
            return
        norms = NormRecord(norm, width, rows)
        fields: list[int | float] = [
            *(x.data_ptr(), rows, width, *norms.fields),
            *(*mode, self.rounding, len(linears)),
        ]
        for linear, patch, out in zip(linears, patches, outs, strict=True):
            matrix: CpuMatrix = linear.weight  # pyright: ignore[reportAssignmentType]
            if matrix.in_features != width:
                raise ValueError(f"rows of {width} for a layer of {matrix.in_features} inputs")
            fields += (
                matrix.record.address,
                native.vector_address(linear.bias, matrix.out_features, "bias"),
                address(out),
                patch_address(patch, rows, matrix, self.packing),
            )
        if self._tape is not None:
            self._tape.note_patches(linears, patches)
        self._call("project", native.PROJECT[len(linears)].pack(*fields))

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        if x.shape != y.shape:
            raise ValueError(f"{tuple(x.shape)} cannot take {tuple(y.shape)}")
        target, y = _plain(x), _plain(y)
        rows, width = x.shape
        norms = NormRecord(norm, width, rows)
        call = native.ADD_NORM.pack(target.data_ptr(), y.data_ptr(), rows, width, *norms.fields)
        self._call("add_norm", call)
        _give_back(target, x)

    def scale(self, x: Tensor, gains: Sequence[RowGain]) -> None:
        rows, width = x.shape
        native.check_runs(gains, rows)
        target = _plain(x)
        parts = [
            native.GAIN.pack(g.first, g.last, native.vector_address(g.vector, width, "gain"))
            for g in gains
        ]
        head = native.SCALE.pack(target.data_ptr(), width, len(gains))
        self._native.blockllm_scale(self._pool, head + b"".join(parts))
        _give_back(target, x)

    def detour(self, x: Tensor, z: Tensor, detours: Sequence[Detour]) -> None:
        if x.shape != z.shape:
            raise ValueError(f"{tuple(x.shape)} cannot take what {tuple(z.shape)} give")
        rows, width = x.shape
        native.check_runs(detours, rows)
        target, z = _plain(x), _plain(z)
        parts = [_detour(d, width) for d in detours]
        head = native.DETOURS.pack(target.data_ptr(), z.data_ptr(), len(detours))
        self._native.blockllm_detour(self._pool, head + b"".join(parts))
        _give_back(target, x)

    def append(self, k: Tensor, v: Tensor, how: Attention, at: Place) -> None:
        if len(k):
            self._attend(None, k, v, None, how, at)

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, how: Attention, at: Place
    ) -> Tensor:
        if self._tape is not None:
            self._tape.attends()
        out = self._empty(*q.shape)
        if len(q):
            self._attend(q, k, v, out, how, at)
        return out

    def _attend(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        out: Tensor | None,
        how: Attention,
        at: Place,
    ) -> None:
        """Append, attend, or both."""
        layer, plan, pages = at.layer, at.plan, at.cache.data
        rotary: CpuRotary | None = how.rotary
        page, kv_heads, dim = pages.shape[2:]
        q, k, v = (x if x is None else _plain(x) for x in (q, k, v))
        native.check_attention(q, k, v, how, at)
        norms = [NormRecord(norm, dim, plan.num_rows) for norm in (how.q_norm, how.k_norm)]
        if self._tape is not None:
            self._tape.note_bounds(layer + 1, math.inf if rotary is None else len(rotary.table))
        self._call(
            "attend",
            native.ATTEND.pack(
                *(address(tensor) for tensor in (q, k, v, out, pages)),
                STORAGE[pages.dtype],
                kv_heads if q is None else q.shape[1] // dim,
                *(kv_heads, dim, page, layer),
                plan.record.address,
                rotary.record.address if rotary is not None else 0,
                *norms[0].fields,
                *norms[1].fields,
                how.scale,
                how.window or 0,
                self.rounding,
            ),
        )

    def split(self, y: Tensor, groups: int, widths: Sequence[int]) -> list[Tensor]:
        y = _plain(y)
        rows, width = y.shape
        if groups * sum(widths) != width:
            raise ValueError(f"rows of {width} do not hold {groups} times {tuple(widths)}")
        parts = [self._empty(rows, groups * part) for part in widths]
        head = native.SPLIT.pack(y.data_ptr(), rows, groups, len(parts))
        places = zip(parts, widths, strict=True)
        tail = b"".join(native.SPLIT_PART.pack(part.data_ptr(), w) for part, w in places)
        self._call("split", head + tail)
        return parts

    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor:
        up = _plain(up)
        out = self._empty(*up.shape)
        gate = gate if gate is None else _plain(gate)
        if gate is not None and gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
        record = native.ACTIVATE.pack(
            address(gate), up.data_ptr(), out.data_ptr(), up.numel(), ACTIVATIONS[kind]
        )
        self._call("activate", record)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 0:
            raise ValueError("there is nothing to choose from in rows of no logits")
        logits = _plain(logits)
        ids = torch.empty(len(logits), dtype=torch.int64)
        call = native.ARGMAX.pack(logits.data_ptr(), *logits.shape, ids.data_ptr())
        self._native.blockllm_argmax(self._pool, call)
        return ids


def _plain(x: Tensor) -> Tensor:
    """`x` itself where it is float32 and contiguous, as the kernels read it; else a copy."""
    if x.dtype is not torch.float32:
        raise ValueError(f"activations must be float32, not {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def _give_back(target: Tensor, x: Tensor) -> None:
    """Copies results into `x` where `_plain` had to copy it."""
    if target is not x:
        x.copy_(target)


def _detour(d: Detour, width: int) -> bytes:
    """One bottleneck of rows of `width`."""
    down: CpuMatrix = d.down.weight  # pyright: ignore[reportAssignmentType]
    up: CpuMatrix = d.up.weight  # pyright: ignore[reportAssignmentType]
    size = down.out_features
    if (down.in_features, up.in_features, up.out_features) != (width, size, width):
        raise ValueError(f"a bottleneck of {down.in_features} to {size} for rows of {width}")
    if down.is_coded or up.is_coded:
        raise ValueError("a bottleneck's matrices cannot be codes")
    return native.DETOUR.pack(
        d.first,
        d.last,
        down.record.address,
        native.vector_address(d.down.bias, size, "bias"),
        up.record.address,
        native.vector_address(d.up.bias, width, "bias"),
        ACTIVATIONS[d.activation],
        d.scale,
    )
