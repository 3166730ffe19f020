"""The forward pass of one unit over the rows of a stage, read top to bottom.

Activations x are [rows, hidden] on the device; the units of layers add to x in place. Patches carry
the attachments of the rows, in the order of the unit's linears, the output's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ext.ops import Cache, Ops, Patch, Place, Plan
from workers.block import AttentionUnit, EmbedUnit, HeadUnit, MlpUnit, ParallelUnit


@dataclass(frozen=True, slots=True)
class Context:
    """What the attention of a stage needs beside its rows: pages and where the rows stand."""

    ops: Ops
    cache: Cache
    plan: Plan


def embed(unit: EmbedUnit, tokens: np.ndarray, at: Context) -> Tensor:
    """tokens int64 [rows] -> x [rows, hidden]."""
    return at.ops.embed(tokens, unit.tokens, unit.scale, unit.positions, at.plan, unit.offset)


def attention(
    unit: AttentionUnit, x: Tensor, layer: int, patches: Sequence[Patch | None], at: Context
) -> None:
    """x += O(attend(Q, K, V of norm(x))), normed where the unit asks; `layer` counts attention
    layers from the chain's bottom."""
    ops = at.ops
    parts = ops.project(x, unit.norm, unit.inputs, patches[:-1])
    if len(parts) == 1:
        grouped = parts[0].unflatten(1, (unit.groups, -1))
        parts = [p.flatten(1).contiguous() for p in grouped.split(unit.widths, dim=2)]
    q, k, v = parts
    y = ops.attend(q, k, v, unit.attention, Place(at.cache, layer, at.plan))
    _add(unit, x, y, patches[-1], at)


def mlp(unit: MlpUnit, x: Tensor, patches: Sequence[Patch | None], at: Context) -> None:
    """x += down(act(gate(norm(x))) * up(norm(x))), normed where the unit asks."""
    _add(unit, x, _activated(unit, x, patches[:-1], at), patches[-1], at)


def parallel(
    unit: ParallelUnit, x: Tensor, layer: int, patches: Sequence[Patch | None], at: Context
) -> None:
    """x += attention(x) + mlp(x): the MLP reads x before the attention adds to it."""
    own = len(unit.attention.roles) + 1
    y = _activated(unit.mlp, x, patches[own:-1], at)
    attention(unit.attention, x, layer, patches[:own], at)
    _add(unit.mlp, x, y, patches[-1], at)


def head(unit: HeadUnit, x: Tensor, patch: Patch | None, at: Context) -> Tensor:
    """x [rows, hidden] -> logits [rows, vocabulary]."""
    return at.ops.project(x, unit.norm, (unit.output,), (patch,))[0]


def _activated(unit: MlpUnit, x: Tensor, patches: Sequence[Patch | None], at: Context) -> Tensor:
    """What an MLP has inside, before its output matrix."""
    parts: Sequence[Tensor] = at.ops.project(x, unit.norm, unit.inputs, patches)
    if unit.fused:
        parts = parts[0].chunk(2, dim=1)
    gate = parts[0] if len(parts) == 2 else None
    return at.ops.activate(gate, parts[-1], unit.activation)


def _add(
    unit: AttentionUnit | MlpUnit, x: Tensor, y: Tensor, patch: Patch | None, at: Context
) -> None:
    """x += output(y), normed first where the unit asks."""
    if unit.post_norm is None:
        at.ops.accumulate(x, y, unit.output, patch)
    else:
        (z,) = at.ops.project(y, None, (unit.output,), (patch,))
        at.ops.add_norm(x, z, unit.post_norm)
