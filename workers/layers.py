"""The forward pass of one layer's unit over the rows of a stage, read top to bottom.

Activations x are [rows, hidden] on the device; units add to x in place. `worn` is what is attached
to the rows. `workers.vocabulary` has the two ends of a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext.ops import Cache, Norm, Ops, Place, Plan
from workers.attachments import Worn
from workers.block import AttentionUnit, MlpUnit, ParallelUnit, StitchUnit
from workers.pieces import Reads


@dataclass(frozen=True, slots=True)
class Context:
    """What the attention of a stage needs beside its rows: pages and where the rows stand. In
    attention layer `written` keys and values stand in the pages already."""

    ops: Ops
    cache: Cache
    plan: Plan
    written: int | None = None


def attention(unit: AttentionUnit, x: Tensor, layer: int, worn: Worn, at: Context) -> None:
    """x += O(attend(Q, K, V of norm(x))), normed where the unit asks; `layer` counts attention
    layers from the chain's bottom."""
    some = slice(1) if layer == at.written else slice(3)
    q, *kv = _attended(unit, x, some, worn, at)
    k, v = kv or (None, None)
    y = at.ops.attend(q, k, v, unit.attention, Place(at.cache, layer, at.plan))
    _add(unit, x, y, x, worn, at)


def write(unit: AttentionUnit, x: Tensor, layer: int, worn: Worn, at: Context) -> None:
    """Only the keys and values of `attention`, into the pages."""
    k, v = _attended(unit, x, slice(1, 3), worn, at)
    at.ops.append(k, v, unit.attention, Place(at.cache, layer, at.plan))


def mlp(unit: MlpUnit, x: Tensor, worn: Worn, at: Context) -> None:
    """x += down(act(gate(norm(x))) * up(norm(x))), normed where the unit asks."""
    _add(unit, x, _activated(unit, x, worn, at), x, worn, at)


def parallel(unit: ParallelUnit, x: Tensor, layer: int, worn: Worn, at: Context) -> None:
    """x += attention(x) + mlp(x): the MLP reads x before the attention adds to it."""
    y = _activated(unit.mlp, x, worn, at)
    before = x.clone() if "down" in worn.detours else x
    attention(unit.attention, x, layer, worn, at)
    _add(unit.mlp, x, y, before, worn, at)


def stitch(unit: StitchUnit, x: Tensor, worn: Worn, at: Context) -> Tensor:
    """x [rows, hidden] -> [rows, width]: see `zoo.manifest.StitchSpec`."""
    (y,) = at.ops.project(x, None, (unit.map,), (worn.linears.get("map"),))
    geometry = at.plan.geometry
    counts = np.diff(geometry.starts)
    before = np.repeat(geometry.contexts - geometry.starts[1:], counts)
    # The exponent of a position's float is its bucket: 0, 1, 2-3, 4-7, ...
    bucket = np.frexp(before + np.arange(geometry.num_rows))[1]
    last = len(unit.positions) - 1
    return y.add_(unit.positions[at.ops.indices(np.minimum(bucket, last))])


def normed(x: Tensor, norm: Norm, ops: Ops) -> Tensor:
    """norm(x), fresh."""
    y = torch.zeros_like(x)
    ops.add_norm(y, x, norm)
    return y


def _attended(
    unit: AttentionUnit, x: Tensor, some: slice, worn: Worn, at: Context
) -> Sequence[Tensor]:
    """Some of Q, K and V of norm(x)."""
    if len(unit.inputs) == 1:
        (fused,) = _inputs(unit, x, worn, at)
        return at.ops.split(fused, unit.groups, unit.widths)[some]
    return _inputs(unit, x, worn, at, some)


def _inputs(
    unit: AttentionUnit | MlpUnit, x: Tensor, worn: Worn, at: Context, some: slice = slice(None)
) -> Sequence[Tensor]:
    """What some of a unit's inputs make of norm(x)."""
    patches = [worn.linears.get(role) for role in unit.roles[some]]
    return at.ops.project(x, unit.norm, unit.inputs[some], patches)


def _activated(unit: MlpUnit, x: Tensor, worn: Worn, at: Context) -> Tensor:
    """What an MLP has inside, before its output matrix."""
    if len(unit.inputs) == 2:
        patches = [worn.linears.get(role) for role in unit.roles]
        return at.ops.project_gated(x, unit.norm, unit.inputs, patches, unit.activation)
    (up,) = _inputs(unit, x, worn, at)
    gate = None
    if unit.fused:
        half = up.shape[1] // 2
        gate, up = at.ops.split(up, 1, (half, half))
    return at.ops.activate(gate, up, unit.activation)


def _add(
    unit: AttentionUnit | MlpUnit, x: Tensor, y: Tensor, before: Tensor, worn: Worn, at: Context
) -> None:
    """x += output(y), normed first where the unit asks, and what adapters beside it add; `before`
    is x as the half-layer read it."""
    ops = at.ops
    role = "o" if isinstance(unit, AttentionUnit) else "down"
    if gains := worn.gains.get(role):
        ops.scale(y, gains)
    patch, detours = worn.linears.get(role), worn.detours.get(role)
    if unit.post_norm is None and detours is None:
        ops.accumulate(x, y, unit.output, patch)
        return
    (added,) = ops.project(y, None, (unit.output,), (patch,))
    if unit.post_norm is not None:
        if detours is None:
            ops.add_norm(x, added, unit.post_norm)
            return
        added = normed(added, unit.post_norm, ops)
    assert detours is not None
    sources = {reads: _source(reads, unit, before, added, ops) for reads, _ in detours}
    x += added
    for reads, some in detours:
        ops.detour(x, sources[reads], some)


def _source(
    reads: Reads, unit: AttentionUnit | MlpUnit, before: Tensor, added: Tensor, ops: Ops
) -> Tensor:
    """What a bottleneck adapter reads, before the stream takes in what its half-layer adds."""
    match reads:
        case "output":
            return added
        case "stream":
            return before + added
        case "input":
            return before.clone()
        case "norm":
            return normed(before, unit.norm, ops)
