"""The forward pass of one unit over the rows of a stage, read top to bottom.

Activations x are [rows, hidden] on the device; attention and MLP units add to x in place. Patches
carry the attachments of the rows, in the order of the unit's linears, the output's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ext.ops import Cache, Ops, Patch, Place, Plan
from workers.block import AttentionUnit, EmbedUnit, HeadUnit, MlpUnit


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
    """x += O(attend(Q, K, V of norm(x))); `layer` counts attention layers from the chain's
    bottom."""
    ops = at.ops
    parts = ops.project(x, unit.norm, unit.inputs, patches[:-1])
    if len(parts) == 1:
        parts = [p.contiguous() for p in parts[0].split(unit.widths, dim=1)]
    q, k, v = parts
    y = ops.attend(q, k, v, unit.attention, Place(at.cache, layer, at.plan))
    ops.accumulate(x, y, unit.output, patches[-1])


def mlp(unit: MlpUnit, x: Tensor, patches: Sequence[Patch | None], at: Context) -> None:
    """x += down(act(gate(norm(x))) * up(norm(x)))."""
    ops = at.ops
    parts = ops.project(x, unit.norm, unit.inputs, patches[:-1])
    gate = parts[0] if len(parts) == 2 else None
    y = ops.activate(gate, parts[-1], unit.activation)
    ops.accumulate(x, y, unit.output, patches[-1])


def head(unit: HeadUnit, x: Tensor, patch: Patch | None, at: Context) -> Tensor:
    """x [rows, hidden] -> logits [rows, vocabulary]."""
    return at.ops.project(x, unit.norm, (unit.output,), (patch,))[0]
