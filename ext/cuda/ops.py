"""CUDA operations behind the interface `ext.ops.Ops`: cuBLAS for the large products, FlashInfer for
attention where it is to be had, Triton for the rest.

Weights, KV and what products read keep the precision of the weights (bf16 for bf16 checkpoints);
residuals, sums, scores and logits are float32. Nothing here waits for the device, so a step can be
captured as a graph. Under Triton's interpreter the same kernels run on a CPU, for tests.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from ext.cuda import lora, paged, pointwise
from ext.cuda.flash import FlashAttention, shape_of
from ext.cuda.launches import Kernels
from ext.cuda.parcel import to_device
from ext.cuda.patches import Round, Slots, prepare_norm, prepared
from ext.cuda.plan import CudaPlan
from ext.cuda.staging import Staging
from ext.ops import (
    Activation,
    Attention,
    Dtype,
    Geometry,
    Linear,
    Norm,
    Patch,
    Place,
)
from ext.plain import DenseMatrix, PlainOps
from ext.quantize import Quantized

_low_rank = Kernels(lora)
_pointwise = Kernels(pointwise)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_BLOCK = 1024
_SHRINK_PARTS = 8
_KEPT_NORMS = 4096


@dataclass(frozen=True, slots=True)
class CudaRotary:
    """cos and sin, float32 [positions, 2, half]."""

    table: Tensor
    interleaved: bool


class CudaOps(PlainOps):
    """See `ext.ops.Ops`. `device` is a CUDA device, or "cpu" under Triton's interpreter; `dtype` is
    what weights become, "auto" or "bfloat16"; `flash` attends in place of our own kernels where it
    has the shape."""

    name = "cuda"

    def __init__(
        self, device: str = "cuda", dtype: Dtype = "auto", flash: FlashAttention | None = None
    ) -> None:
        super().__init__(device)
        self._flash = flash
        self.dtype: Dtype = dtype
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        self._programs = 2 * _multiprocessors(self.device)
        self._norms: OrderedDict[tuple[int, int, int], tuple[Norm, Slots]] = OrderedDict()

    def loading(self) -> AbstractContextManager[None]:
        return super().loading() if self._staging is None else self._staging.loading()

    def matrix(self, weight: Tensor, *, transposed: bool = False) -> DenseMatrix:
        data = weight.clone() if self._staging is None else self._staging.copy(weight)
        if self.dtype == "bfloat16":
            data = data.bfloat16()
        return DenseMatrix(data.t().contiguous() if transposed else data.contiguous())

    def coded(self, weight: Quantized) -> DenseMatrix:
        """Right, but in the memory of float32: no kernel here reads codes."""
        return self.matrix(weight.dense())

    def rotary(
        self, inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
    ) -> CudaRotary:
        frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        table = torch.stack((angles.cos() * factor, angles.sin() * factor), 1)
        return CudaRotary(table.contiguous().to(self.device), interleaved)

    def indices(self, rows: np.ndarray) -> Tensor:
        return to_device(rows.astype(np.int64, copy=False), self.device)

    def plan(self, geometry: Geometry, last: CudaPlan | None = None) -> CudaPlan:
        return CudaPlan(geometry, self.device)

    def embed(
        self,
        tokens: np.ndarray,
        table: DenseMatrix,
        scale: float,
        positions: DenseMatrix | None,
        plan: CudaPlan,
        offset: int,
    ) -> Tensor:
        x = F.embedding(self.indices(tokens), table.data).float()
        if scale != 1.0:
            x *= scale
        if positions is not None:
            x += F.embedding(plan.positions + offset, positions.data)
        return x

    # ---- linear layers --------------------------------------------------------------------------

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        rows = self._normed(x, norm, _storage(linears[0])) if norm is not None else x
        outs: list[Tensor] = []
        for linear, patch in zip(linears, patches, strict=True):
            y = self._multiply(rows, linear, patch)
            slots = prepared(patch, len(x), self.device).slots if patch is not None else None
            if linear.bias is not None or slots is not None:
                self._finish(y, y, linear.bias, slots, add=False)
            outs.append(y)
        return outs

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        z = self._multiply(y, linear, patch)
        slots = prepared(patch, len(x), self.device).slots if patch is not None else None
        if linear.bias is None and slots is None:
            x += z
        else:
            self._finish(z, x, linear.bias, slots, add=True)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        self._norm_into(y, x, norm, add=True)

    def _normed(self, x: Tensor, norm: Norm, storage: torch.dtype, each: int = 1) -> Tensor:
        out = torch.empty(x.shape, dtype=storage, device=self.device)
        self._norm_into(x, out, norm, each, add=False)
        return out

    def _norm_into(self, x: Tensor, out: Tensor, norm: Norm, each: int = 1, *, add: bool) -> None:
        """Norm rows of x, of which a row of the batch is `each`."""
        if len(x) == 0:
            return
        slots = self._norm_slots(norm, len(x), each) if norm.rows else None
        padded = 1 << (x.shape[1] - 1).bit_length()
        bias = norm.bias
        _pointwise.norm_rows[(len(x),)](
            x,
            out,
            x.shape[1],
            norm.eps,
            norm.weight,
            norm.weight if bias is None else bias,
            None if slots is None else slots.rows,
            None if slots is None else slots.first,
            None if slots is None else slots.second,
            HAS_BIAS=bias is not None,
            LAYER=norm.kind == "layer",
            SLOTTED=slots is not None,
            ADD=add,
            WIDTH_PAD=padded,
            num_warps=min(16, max(4, padded // 512)),
        )

    def _norm_slots(self, norm: Norm, rows: int, each: int) -> Slots:
        """Row slots of a norm: made once while the caller keeps the norm for its arrangement."""
        key = (id(norm), rows, each)
        if key not in self._norms:
            self._norms[key] = (norm, prepare_norm(norm, rows, each, self.device))
            if len(self._norms) > _KEPT_NORMS:
                self._norms.popitem(last=False)
        return self._norms[key][1]

    def _multiply(self, x: Tensor, linear: Linear, patch: Patch | None) -> Tensor:
        """x W^T and the low-rank pieces, float32."""
        weight: Tensor = linear.weight.data  # pyright: ignore[reportAttributeAccessIssue]
        y = _product(x, weight)
        if patch is not None:
            for part in prepared(patch, len(x), self.device).rounds:
                self._low_rank(x, y, part)
        return y

    def _low_rank(self, x: Tensor, y: Tensor, part: Round) -> None:
        width, out = x.shape[1], y.shape[1]
        x = x.contiguous()
        shape = (_SHRINK_PARTS, part.count, lora.TILE_ROWS, part.rank)
        block_r = min(part.rank, lora.BLOCK_RANK)
        shrunk = torch.empty(shape, dtype=torch.float32, device=self.device)
        shared = {
            "RANK": part.rank,
            "BLOCK_R": block_r,
            "PARTS": _SHRINK_PARTS,
            "ROWS": lora.TILE_ROWS,
            "STORAGE": _TYPES[part.dtype],
            "PRECISION": "ieee",
        }
        _low_rank.shrink[(part.count, _SHRINK_PARTS, part.rank // block_r)](
            x,
            width,
            part.tiles,
            part.pointers,
            part.ranks,
            shrunk,
            part.count,
            BLOCK_K=64,
            **shared,
        )
        block = 128
        _low_rank.expand[(part.count, -(-out // block))](
            shrunk,
            y,
            out,
            part.tiles,
            part.pointers,
            part.ranks,
            part.scales,
            part.count,
            BLOCK_O=block,
            **shared,
        )

    def _finish(
        self, y: Tensor, out: Tensor, bias: Tensor | None, slots: Slots | None, *, add: bool
    ) -> None:
        rows, width = y.shape
        if rows == 0:
            return
        _pointwise.finish_rows[(rows, -(-width // _BLOCK))](
            y,
            out,
            width,
            y if bias is None else bias,
            None if slots is None else slots.rows,
            None if slots is None else slots.first,
            None if slots is None else slots.second,
            HAS_BIAS=bias is not None,
            SLOTTED=slots is not None,
            ADD=add,
            BLOCK=_BLOCK,
        )

    # ---- attention and what lies between the products -------------------------------------------

    def append(self, k: Tensor, v: Tensor, how: Attention, at: Place) -> None:
        if len(k):
            k, norm = self._own_norms(k, how.k_norm, at)
            paged.append(None, (k, v), replace(how, k_norm=norm), at)

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, how: Attention, at: Place
    ) -> Tensor:
        if len(q) == 0:
            return torch.empty(q.shape, dtype=at.cache.data.dtype, device=self.device)
        q, q_norm = self._own_norms(q, how.q_norm, at)
        kv, k_norm = None, None
        if k is not None and v is not None:
            k, k_norm = self._own_norms(k, how.k_norm, at)
            kv = (k, v)
        rows = paged.append(q, kv, replace(how, q_norm=q_norm, k_norm=k_norm), at)
        if self._flash is not None and self._flash.serves(shape_of(rows, how, at)):
            return self._flash.attend(rows, how, at)
        return paged.attend(rows, how, at, self._programs)

    def _own_norms(self, x: Tensor, norm: Norm | None, at: Place) -> tuple[Tensor, Norm | None]:
        """Heads of q or k, and the norm that `append` applies: one that differs between rows is
        applied ahead of it."""
        if norm is None or not norm.rows:
            return x, norm
        return self._head_norm(x, norm, at.cache.data.shape[4]), None

    def _head_norm(self, x: Tensor, norm: Norm, dim: int) -> Tensor:
        heads = x.shape[1] // dim
        return self._normed(x.reshape(-1, dim), norm, torch.float32, heads).view(x.shape)

    def project_gated(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        kind: Activation,
    ) -> Tensor:
        gate, up = self.project(x, norm, linears, patches)
        # The product that follows reads it in this precision.
        return self._activated(gate, up, kind, _storage(linears[0]))

    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor:
        return self._activated(gate, up, kind, torch.float32)

    def _activated(
        self, gate: Tensor | None, up: Tensor, kind: Activation, dtype: torch.dtype
    ) -> Tensor:
        up = up.contiguous()
        out = torch.empty(up.shape, dtype=dtype, device=self.device)
        if up.numel() == 0:
            return out
        _pointwise.activate[(-(-up.numel() // _BLOCK),)](
            up if gate is None else gate.contiguous(),
            up,
            out,
            up.numel(),
            GATED=gate is not None,
            KIND=_ACTIVATIONS[kind],
            BLOCK=_BLOCK,
        )
        return out


def _storage(linear: Linear) -> torch.dtype:
    """The precision of a linear's weights, in which products read their rows."""
    return linear.weight.data.dtype  # pyright: ignore[reportAttributeAccessIssue]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with float32 sums and results; x is rounded to the precision of the weights."""
    x = x.to(weight.dtype)
    if weight.dtype is torch.float32:
        return F.linear(x, weight)
    if weight.device.type == "cuda":
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
