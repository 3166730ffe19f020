"""Launches of the attention kernels: block shapes, splits of long contexts, scratch memory."""

import torch
from torch import Tensor

from ext.cuda import attention
from ext.cuda.launches import Kernels
from ext.cuda.plan import BLOCK_KEYS, Blocks, CudaPlan
from ext.ops import Attention, Norm, Place

_kernels = Kernels(attention)

_NORMS = {"rms": 1, "layer": 2}
# Rows of a tile of queries: tensor cores want 16 at least, chunks of prompts fill 64.
_FEWEST_ROWS = 16
_CHUNK_ROWS = 64


def append(q: Tensor | None, kv: tuple[Tensor, Tensor] | None, how: Attention, at: Place) -> Tensor:
    """Norm and rotate q and k, write k and v to their pages, as far as there are such; returns q
    in the cache's precision."""
    plan: CudaPlan = at.plan
    cache = at.cache.data
    kv_heads, dim = cache.shape[3:]
    heads = 0 if q is None else q.shape[1] // dim
    # In place of what is not there something stands that is not read.
    there = [x.contiguous() for x in (q, *(kv or ())) if x is not None]
    q, k, v = there * 3 if kv is None else (there[0], *there[-2:])
    out = torch.empty(q.shape, dtype=cache.dtype, device=cache.device)
    norm, other = how.q_norm, how.k_norm
    rotary = how.rotary
    table = plan.parts.tables[:, at.layer]
    programs = heads + (0 if kv is None else 2 * kv_heads)
    _kernels.append[(len(q), programs)](
        q,
        k,
        v,
        out,
        cache,
        plan.parts.sequences,
        plan.parts.positions,
        table,
        table.stride(0),
        q if rotary is None else rotary.table,
        q if norm is None else norm.weight,
        q if other is None else other.weight,
        _bias(norm, q),
        _bias(other, q),
        0.0 if norm is None else norm.eps,
        0.0 if other is None else other.eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        DIM_PAD=_power_of_2(dim),
        PAGE=at.cache.page,
        HALF=0 if rotary is None else rotary.table.shape[2],
        INTERLEAVED=rotary is not None and rotary.interleaved,
        Q_NORM=0 if norm is None else _NORMS[norm.kind],
        K_NORM=0 if other is None else _NORMS[other.kind],
        Q_BIAS=norm is not None and norm.bias is not None,
        K_BIAS=other is not None and other.bias is not None,
    )
    return out


def attend(q: Tensor, how: Attention, at: Place, programs: int) -> Tensor:
    """Causal attention of rows q [rows, heads * dim] over their pages; `programs` fill the
    device."""
    plan: CudaPlan = at.plan
    kv_heads, dim = at.cache.data.shape[3:]
    group = q.shape[1] // (kv_heads * dim)
    out = torch.empty_like(q)
    if plan.num_singles:
        spans = plan.spans(programs, kv_heads)
        padded = max(_FEWEST_ROWS, _power_of_2(group))
        _launch(q, out, how, at, (plan.parts.single_blocks, padded, padded), spans)
    if len(plan.chunks):
        padded = _power_of_2(group)
        rows = max(1, _CHUNK_ROWS // padded)
        blocks = plan.chunk_blocks(rows)
        _launch(q, out, how, at, (blocks, padded, max(_FEWEST_ROWS, rows * padded)), 1)
    return out


def _launch(
    q: Tensor,
    out: Tensor,
    how: Attention,
    at: Place,
    tile: tuple[Blocks, int, int],
    spans: int,
) -> None:
    """One launch over `tile` (blocks, padded group, rows), contexts split into `spans`."""
    plan: CudaPlan = at.plan
    cache = at.cache.data
    kv_heads, dim = cache.shape[3:]
    heads = q.shape[1] // dim
    blocks, padded, rows = tile
    table = plan.parts.tables[:, at.layer]
    partial = maxima = sums = q
    if spans > 1:
        partial = torch.empty((spans, len(q), heads, dim), dtype=torch.float32, device=q.device)
        maxima, sums = torch.empty(
            (2, spans, len(q), heads), dtype=torch.float32, device=q.device
        ).unbind()
    _kernels.attend[(blocks.count, kv_heads, spans)](
        q,
        cache,
        out,
        partial,
        maxima,
        sums,
        blocks.data,
        table,
        table.stride(0),
        plan.parts.longest,
        how.scale,
        how.window or 0,
        len(q),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PAD=padded,
        DIM=dim,
        DIM_PAD=max(16, _power_of_2(dim)),
        PAGE=at.cache.page,
        BLOCK_M=rows,
        BLOCK_N=BLOCK_KEYS,
        SPLIT=spans > 1,
        PRECISION="ieee",
    )
    if spans > 1:
        _combine((partial, maxima, sums), out, plan, spans, dim)


def _combine(
    parts: tuple[Tensor, Tensor, Tensor], out: Tensor, plan: CudaPlan, spans: int, dim: int
) -> None:
    """Put the spans of single rows together."""
    heads = out.shape[1] // dim
    _kernels.combine[(plan.num_singles, heads)](
        *parts,
        out,
        plan.parts.singles,
        spans,
        len(out),
        HEADS=heads,
        DIM=dim,
        DIM_PAD=_power_of_2(dim),
    )


def _bias(norm: Norm | None, stand_in: Tensor) -> Tensor:
    return stand_in if norm is None or norm.bias is None else norm.bias


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
