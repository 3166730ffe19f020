"""Native CPU operations: the kernels of ext/cpu behind the interface `ext.ops.Ops`.

Weights stay in their stored 2 or 4 bytes, repacked into panels; activations and sums are float32.
A row's results have the same bits whatever other rows share its batch, and whatever the number of
threads. Each operation packs one record (`ext.native`) and makes one foreign call, which releases
the interpreter's lock.
"""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext import native
from ext.build import Isa
from ext.memory import Arena, reserve
from ext.ops import Activation, Attention, Geometry, Linear, Norm, Patch, Place
from ext.reference import normalize

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_BLOCK_ROWS = 8


@dataclass(eq=False, slots=True)
class CpuMatrix:
    """A packed weight: panels in `memory`, and the record that describes them."""

    out_features: int
    in_features: int
    nbytes: int
    memory: np.ndarray
    record: native.Record


@dataclass(eq=False, slots=True)
class CpuRotary:
    """cos and sin per position, float32 [positions, 2, half]."""

    table: Tensor
    record: native.Record


@dataclass(eq=False, slots=True)
class CpuPlan:
    """The int32 arrays that the record points at: see `Plan` in records.h."""

    geometry: Geometry
    num_rows: int
    num_layers: int
    num_positions: int
    row_positions: np.ndarray
    arrays: tuple[np.ndarray, ...]
    record: native.Record


class CpuOps:
    """See `ext.ops.Ops`. `threads` 0: as many as torch uses; `isa` "auto": the best of the machine.

    Raises Unavailable where the kernels cannot be built or run. Calls may come from several Python
    threads; they take turns.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, threads: int = 0, isa: Isa | str = "auto") -> None:
        self.isa = native.choose(isa)
        self.threads = threads or torch.get_num_threads()
        self._native = native.load(self.isa)
        self._arena = Arena()
        self._panel = self._native.blockllm_panel()
        self._pool = ctypes.c_void_p(self._native.blockllm_open(self.threads))
        weakref.finalize(self, self._native.blockllm_close, self._pool)

    def matrix(self, weight: Tensor, *, transposed: bool = False) -> CpuMatrix:
        weight = weight.t() if transposed else weight
        if weight.dtype not in _STORAGE:
            raise ValueError(f"weights must be float32, float16 or bfloat16, not {weight.dtype}")
        if weight.numel() == 0:
            raise ValueError(f"a matrix of {tuple(weight.shape)} has no weights")
        out, width = weight.shape
        panels = -(-out // self._panel)
        nbytes = panels * self._panel * width * weight.element_size()
        memory = self._arena.take(nbytes)
        view = (memory.ctypes.data, out, width, _STORAGE[weight.dtype])
        packing = native.PACKING.pack(*view, weight.data_ptr(), *weight.stride())
        self._native.blockllm_pack(self._pool, packing)
        return CpuMatrix(out, width, nbytes, memory, native.Record(native.MATRIX.pack(*view)))

    def vector(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def factor(self, weight: Tensor) -> Tensor:
        return self.vector(weight)

    def rotary(
        self, inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
    ) -> CpuRotary:
        frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        table = torch.stack((angles.cos() * factor, angles.sin() * factor), 1).contiguous()
        half = len(inverse_frequencies)
        record = native.Record(native.ROTARY.pack(table.data_ptr(), half, interleaved, positions))
        return CpuRotary(table, record)

    def memory(self, nbytes: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(reserve(nbytes), np.uint8, nbytes))

    def plan(self, geometry: Geometry) -> CpuPlan:
        starts, contexts = geometry.starts, geometry.contexts
        counts = np.diff(starts)
        sequences = np.arange(len(counts))
        row_sequence = np.repeat(sequences, counts)
        rows = np.arange(geometry.num_rows)
        row_positions = rows + (contexts - starts[1:])[row_sequence]
        blocks = -(-counts // _BLOCK_ROWS)
        owner = np.repeat(sequences, blocks)
        index = np.arange(len(owner)) - (np.cumsum(blocks) - blocks)[owner]
        first = np.append(starts[:-1][owner] + index * _BLOCK_ROWS, geometry.num_rows)
        arrays = tuple(
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (geometry.tables, row_sequence, row_positions, first)
        )
        _, layers, pages = geometry.tables.shape
        record = native.Record(
            native.PLAN.pack(*(a.ctypes.data for a in arrays), len(rows), len(owner), layers, pages)
        )
        last = int(contexts.max()) if len(contexts) else 0
        return CpuPlan(geometry, len(rows), layers, last, arrays[2], arrays, record)

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
        out = torch.empty(len(tokens), table.in_features)
        if len(tokens) == 0:
            return out
        if tokens.min() < 0 or tokens.max() >= table.out_features:
            raise ValueError(f"a token lies outside the vocabulary of {table.out_features}")
        if positions is not None and plan.num_positions + offset > positions.out_features:
            raise ValueError(f"a position lies beyond the {positions.out_features} of the model")
        self._native.blockllm_embed(
            self._pool,
            native.EMBED.pack(
                table.record.address,
                positions.record.address if positions is not None else 0,
                tokens.ctypes.data,
                plan.row_positions.ctypes.data,
                len(tokens),
                offset,
                scale,
                out.data_ptr(),
            ),
        )
        return out

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        rows = len(x)
        outs = [torch.empty(rows, linear.weight.out_features) for linear in linears]
        self._project(_plain(x), norm, linears, patches, outs, 0)
        return outs

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        if x.shape != (len(y), linear.weight.out_features):
            raise ValueError(
                f"{tuple(x.shape)} cannot take {len(y)} x {linear.weight.out_features} results"
            )
        target = _plain(x)
        self._project(_plain(y), None, (linear,), (patch,), (target,), 1)
        if target is not x:
            x.copy_(target)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        # In torch: it passes over the rows once, and few families ask for it.
        x += normalize(y, norm)

    def _project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        outs: Sequence[Tensor],
        accumulate: int,
    ) -> None:
        rows, width = x.shape
        if rows == 0:
            return
        fields: list[int | float] = [
            x.data_ptr(),
            rows,
            width,
            *native.norm_fields(norm, width),
            accumulate,
            len(linears),
        ]
        for linear, patch, out in zip(linears, patches, outs, strict=True):
            matrix, bias = linear.weight, linear.bias
            if matrix.in_features != width:
                raise ValueError(f"rows of {width} for a layer of {matrix.in_features} inputs")
            fields += (
                matrix.record.address,  # pyright: ignore[reportAttributeAccessIssue]
                bias.data_ptr() if bias is not None else 0,
                out.data_ptr(),
                native.patch_address(patch),
            )
        self._native.blockllm_project(self._pool, native.PROJECT[len(linears)].pack(*fields))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attention, at: Place) -> Tensor:
        cache, layer, plan = at.cache, at.layer, at.plan
        rotary: CpuRotary | None = how.rotary
        q, k, v = _plain(q), _plain(k), _plain(v)
        _, _, page, kv_heads, dim = cache.data.shape
        rows, width = q.shape
        out = torch.empty(rows, width)
        if rows == 0:
            return out
        heads = width // dim
        if (
            rows != plan.num_rows
            or not k.shape == v.shape == (rows, kv_heads * dim)
            or heads % kv_heads
        ):
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
                f" {plan.num_rows} rows of {kv_heads} kv heads"
            )
        if layer >= plan.num_layers or (
            rotary is not None and plan.num_positions > len(rotary.table)
        ):
            raise ValueError(
                f"layer {layer} or position {plan.num_positions - 1} lies beyond what was prepared"
            )
        self._native.blockllm_attend(
            self._pool,
            native.ATTEND.pack(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                out.data_ptr(),
                cache.data.data_ptr(),
                heads,
                kv_heads,
                dim,
                page,
                layer,
                plan.record.address,
                rotary.record.address if rotary is not None else 0,
                *native.norm_fields(how.q_norm, dim),
                *native.norm_fields(how.k_norm, dim),
                how.scale,
                how.window or 0,
            ),
        )
        return out

    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor:
        up = _plain(up)
        out = torch.empty(up.shape)
        gate = gate if gate is None else _plain(gate)
        if gate is not None and gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
        record = native.ACTIVATE.pack(
            gate.data_ptr() if gate is not None else 0,
            up.data_ptr(),
            out.data_ptr(),
            up.numel(),
            _ACTIVATIONS[kind],
        )
        self._native.blockllm_activate(self._pool, record)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """The first position of each row's largest value: float32 [rows, width] -> int64 [rows]."""
        logits = _plain(logits)
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._native.blockllm_argmax(self._pool, _selection(logits, 1, ids, None))
        return ids

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Each row's k largest values, largest first and equal ones by position, and their
        positions: float32 and int64 [rows, k]."""
        if not 1 <= k <= logits.shape[1]:
            raise ValueError(f"top {k} of {logits.shape[1]} values")
        logits = _plain(logits)
        values = torch.empty(len(logits), k)
        ids = torch.empty(len(logits), k, dtype=torch.int64)
        self._native.blockllm_top_k(self._pool, _selection(logits, k, ids, values))
        return values, ids

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """log(sum(exp(row))) of each row: float32 [rows]."""
        logits = _plain(logits)
        values = torch.empty(len(logits))
        self._native.blockllm_log_sum_exp(self._pool, _selection(logits, 1, None, values))
        return values


def _plain(x: Tensor) -> Tensor:
    """`x` itself where it is float32 and contiguous, as the kernels read it; else a copy."""
    if x.dtype is not torch.float32:
        raise ValueError(f"activations must be float32, not {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def _selection(logits: Tensor, k: int, ids: Tensor | None, values: Tensor | None) -> bytes:
    if logits.shape[1] == 0:
        raise ValueError("there is nothing to choose from in rows of no logits")
    targets = (tensor.data_ptr() if tensor is not None else 0 for tensor in (ids, values))
    return native.SELECT.pack(logits.data_ptr(), *logits.shape, k, *targets)
