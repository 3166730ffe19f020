"""Rotary embeddings as the native CPU kernels read them: a table, made once for a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ext import native


@dataclass(eq=False, slots=True)
class CpuRotary:
    """cos and sin per position, float32 [positions, 2, half]."""

    table: Tensor
    record: native.Record


def tabulate(
    inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
) -> CpuRotary:
    """See `ext.ops.Ops.rotary`."""
    frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    table = torch.stack((angles.cos() * factor, angles.sin() * factor), 1).contiguous()
    half = len(inverse_frequencies)
    record = native.Record(native.ROTARY.pack(table.data_ptr(), half, interleaved, positions))
    return CpuRotary(table, record)
