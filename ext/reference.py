"""The kernel interface in plain torch: the specification that native kernels are compared with.

Runs on any torch device in float32. Clarity before speed: attention gathers pages and calls
scaled_dot_product_attention per sequence (prefill) or per group of single rows (decode).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ext.ops import (
    Activation,
    Attention,
    Cache,
    Dtype,
    Geometry,
    Linear,
    Norm,
    NormKind,
    Patch,
    Place,
)
from ext.plain import DenseMatrix, PlainOps
from ext.quantize import Quantized


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin [positions, rotated width / 2], float32."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """`sequences` and `positions` [rows] say where a row stands; `tables` [layers, S, P]; `singles`
    are the sequences of one row, with their rows."""

    geometry: Geometry
    sequences: Tensor
    positions: Tensor
    tables: Tensor
    singles: Tensor
    single_rows: Tensor
    chunks: tuple[tuple[int, int, int, int], ...]


class TorchOps(PlainOps):
    """Reference operations; see `ext.ops.Ops` for shapes and meaning."""

    name = "torch"

    dtype: Dtype = "float32"

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)

    def matrix(self, weight: Tensor, *, transposed: bool = False) -> DenseMatrix:
        weight = weight.to(self.device, torch.float32)
        return DenseMatrix(weight.t() if transposed else weight)

    def coded(self, weight: Quantized) -> DenseMatrix:
        return DenseMatrix(weight.dense().to(self.device))

    def rotary(
        self, inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
    ) -> Rotary:
        frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32, device=self.device)
        angles = torch.arange(positions, dtype=torch.float32, device=self.device)[:, None]
        angles = angles * frequencies
        return Rotary(angles.cos() * factor, angles.sin() * factor, interleaved)

    def plan(self, geometry: Geometry, last: TorchPlan | None = None) -> TorchPlan:
        starts, contexts = geometry.starts, geometry.contexts
        counts = np.diff(starts)
        sequence = np.repeat(np.arange(len(counts)), counts)
        rows = np.arange(geometry.num_rows)
        positions = rows - starts[:-1][sequence] + (contexts - counts)[sequence]
        single = np.flatnonzero(counts == 1)
        chunks = tuple(
            (int(i), int(starts[i]), int(starts[i + 1]), int(contexts[i]))
            for i in np.flatnonzero(counts > 1)
        )

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

        return TorchPlan(
            geometry=geometry,
            sequences=put(sequence),
            positions=put(positions),
            tables=put(geometry.tables.transpose(1, 0, 2)),
            singles=put(single),
            single_rows=put(starts[:-1][single]),
            chunks=chunks,
        )

    def embed(
        self,
        tokens: np.ndarray,
        table: DenseMatrix,
        scale: float,
        positions: DenseMatrix | None,
        plan: TorchPlan,
        offset: int,
    ) -> Tensor:
        x = F.embedding(torch.from_numpy(tokens).to(self.device), table.data)
        if scale != 1.0:
            x = x * scale
        if positions is not None:
            x = x + F.embedding(plan.positions + offset, positions.data)
        return x

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        if norm is not None:
            x = normalize(x, norm)
        return [self._linear(x, a, b) for a, b in zip(linears, patches, strict=True)]

    def _linear(self, x: Tensor, linear: Linear, patch: Patch | None) -> Tensor:
        y = F.linear(x, linear.weight.data)  # type: ignore[attr-defined]
        for s in patch.segments if patch is not None else ():
            low = F.linear(x[s.first : s.last], s.a.float()) * s.scale
            y[s.first : s.last] += F.linear(low, s.b.float())
        biases = [] if linear.bias is None else [(0, len(y), linear.bias)]
        for f in patch.finishes if patch is not None else ():
            if f.gain is not None:
                y[f.first : f.last] *= f.gain
            if f.bias is not None:
                biases = _replaced(biases, f.first, f.last, f.bias)
        for first, last, bias in biases:
            y[first:last] += bias
        return y

    def append(self, k: Tensor, v: Tensor, how: Attention, at: Place) -> None:
        cache, plan = at.cache, at.plan
        k, v = (t.view(len(t), -1, cache.data.shape[4]) for t in (k, v))
        k = _turned(k, how.k_norm, how, plan)
        written = plan.tables[at.layer][plan.sequences, plan.positions // cache.page]
        for part, new in enumerate((k, v)):
            cache.data[written, part, plan.positions % cache.page] = new.to(cache.data.dtype)

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, how: Attention, at: Place
    ) -> Tensor:
        if k is not None and v is not None:
            self.append(k, v, how, at)
        cache, plan = at.cache, at.plan
        kv_heads, dim = cache.data.shape[3:]
        q = _turned(q.view(len(q), -1, dim), how.q_norm, how, plan)
        table = plan.tables[at.layer]
        out = torch.empty_like(q)
        if len(plan.singles):
            rows = plan.single_rows
            context = plan.positions[rows] + 1
            pages = table[plan.singles][:, : (int(context.max()) - 1) // cache.page + 1]
            out[rows] = _attend_rows(q[rows], _gather(cache, pages), context, how)
        for i, first, last, context in plan.chunks:
            pages = table[i : i + 1, : (context - 1) // cache.page + 1]
            keys = _gather(cache, pages)[:, :, :context]
            out[first:last] = _attend_chunk(q[first:last], keys, how, kv_heads)
        return out.view(len(out), -1)

    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor:
        a = up if gate is None else gate
        if kind == "silu":
            a = F.silu(a)
        else:
            a = F.gelu(a, approximate="tanh" if kind == "gelu_tanh" else "none")
        return a if gate is None else a * up

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        x += self._linear(y, linear, patch)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        x += normalize(y, norm)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """RMS or layer norm over the last axis, float32."""
    y = _normalized(x, norm.kind, norm.eps, norm.weight, norm.bias)
    for own in norm.rows:
        rows = slice(own.first, own.last)
        y[rows] = _normalized(x[rows], norm.kind, norm.eps, own.weight, own.bias)
    return y


def _normalized(
    x: Tensor, kind: NormKind, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _replaced(
    biases: list[tuple[int, int, Tensor]], first: int, last: int, bias: Tensor
) -> list[tuple[int, int, Tensor]]:
    """Runs of rows and their biases, once rows [first, last) have another."""
    kept: list[tuple[int, int, Tensor]] = []
    for begin, end, own in biases:
        kept += [(begin, min(end, first), own), (max(begin, last), end, own)]
    return [run for run in kept if run[0] < run[1]] + [(first, last, bias)]


def _turned(x: Tensor, norm: Norm | None, how: Attention, plan: TorchPlan) -> Tensor:
    """Heads [rows, heads, dim], normalized and rotated."""
    x = x if norm is None else normalize(x, norm)
    return x if how.rotary is None else rotate(x, how.rotary, plan.positions)


def rotate(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [rows, heads, dim] at `positions` [rows]."""
    cos, sin = (t[positions][:, None] for t in (rotary.cos, rotary.sin))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)


def _gather(cache: Cache, pages: Tensor) -> Tensor:
    """Pages [S, P] -> keys and values [S, 2, P * page, kv_heads, dim], float32."""
    data = cache.data[pages].transpose(1, 2).float()
    return data.reshape(*data.shape[:2], -1, *data.shape[-2:])


def _attend_rows(q: Tensor, keys: Tensor, context: Tensor, how: Attention) -> Tensor:
    """One row per sequence: q [S, heads, dim], keys [S, 2, T, kv_heads, dim], context [S]."""
    at = torch.arange(keys.shape[2], device=q.device)
    seen = at < context[:, None]
    if how.window is not None:
        seen &= at >= context[:, None] - how.window
    # What lies beyond the context was never written and may be NaN, which no mask would stop.
    keys = keys.masked_fill(~seen[:, None, :, None, None], 0.0)
    k, v = keys[:, 0].transpose(1, 2), keys[:, 1].transpose(1, 2)
    grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])
    out = F.scaled_dot_product_attention(
        grouped, k, v, attn_mask=seen[:, None, None, :], scale=how.scale
    )
    return out.reshape(q.shape)


def _attend_chunk(q: Tensor, keys: Tensor, how: Attention, kv_heads: int) -> Tensor:
    """Rows that end a sequence: q [n, heads, dim], keys [1, 2, T, kv_heads, dim], T its context."""
    n, heads, _ = q.shape
    k, v = keys[:, 0].transpose(1, 2), keys[:, 1].transpose(1, 2)
    total = k.shape[2]
    at = torch.arange(total, device=q.device)
    row = at[total - n :, None]
    seen = at <= row
    if how.window is not None:
        seen &= at > row - how.window
    group = heads // kv_heads
    grouped = q.view(n, kv_heads, group, -1).permute(1, 2, 0, 3)[None]
    out = F.scaled_dot_product_attention(
        grouped, k[:, :, None], v[:, :, None], attn_mask=seen, scale=how.scale
    )
    return out[0].permute(2, 0, 1, 3).reshape(q.shape)
