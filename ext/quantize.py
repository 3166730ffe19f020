"""Weights of 8 or 4 bits, in groups of inputs that share a scale: chosen here, for every device.

A weight w becomes a code q with w = scale * q (+ offset), scale and offset in bfloat16 per output
and group. int8: 64 inputs share a scale, codes lie in [-127, 127]. int4: 32 inputs share a scale
and an offset, codes lie in [0, 15] and the span they cover is the one of a few with the least
squared error. So 8.25 and 5 bits a weight. Kernels fold scales in once per group; sums stay
float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal["int8", "int4"]
GROUP: dict[Bits, int] = {"int8": 64, "int4": 32}

_RANGE: dict[Bits, tuple[int, int]] = {"int8": (-127, 127), "int4": (0, 15)}
# Shares of a group's whole span that 4 bits are tried on: outliers cost the others resolution.
_SPANS = (1.0, 0.93, 0.86, 0.79)
# Weights that are turned at once: what fits a core's own cache.
_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [out, width] as codes: int8 [out, groups, inputs of a group], zeros behind `width`;
    `scales` and `offsets` (None: there are none) bfloat16 [out, groups]. `lost` and `norm` are the
    sums of squares of what was lost and of the weights."""

    bits: Bits
    width: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    lost: float
    norm: float

    def dense(self) -> Tensor:
        """The weights that the codes stand for, float32 [out, width]."""
        dense = self.codes.float() * self.scales.float()[:, :, None]
        if self.offsets is not None:
            dense += self.offsets.float()[:, :, None]
        return dense.flatten(1)[:, : self.width].contiguous()


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """A float matrix [out, width], of any strides, in codes. Raises ValueError."""
    out, width = weight.shape
    if weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"a matrix of {tuple(weight.shape)} {weight.dtype} has no codes")
    groups = -(-width // GROUP[bits])
    codes = torch.empty(out, groups, GROUP[bits], dtype=torch.int8)
    scales, offsets = torch.empty(2, out, groups, dtype=torch.bfloat16)
    lost = norm = 0.0
    choose = _around_zero if bits == "int8" else _spanning
    for rows in _slices(out, width):
        x = _grouped(weight[rows], GROUP[bits])
        scale, offset = choose(x)
        coded = _coded(x, scale, offset, _RANGE[bits])
        codes[rows], scales[rows], offsets[rows] = coded, scale[..., 0], offset[..., 0]
        norm += float(x.flatten(1)[:, :width].square().sum())
        away = coded.mul_(scale).add_(offset).sub_(x).flatten(1)[:, :width]
        lost += float(away.square_().sum())
    codes.flatten(1)[:, width:] = 0
    return Quantized(bits, width, codes, scales, offsets if bits == "int4" else None, lost, norm)


def coded_bytes(shape: tuple[int, ...], bits: Bits) -> int:
    """Bytes of a matrix of that shape as codes, scales and offsets."""
    out, width = shape
    groups = -(-width // GROUP[bits])
    return out * groups * (GROUP[bits] + 2 if bits == "int8" else GROUP[bits] // 2 + 4)


def _slices(out: int, width: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // width)
    return (slice(first, min(first + step, out)) for first in range(0, out, step))


def _grouped(rows: Tensor, group: int) -> Tensor:
    """float32 [rows, groups, group]; the last group is filled up with its last weight, so that what
    stands behind it widens no span."""
    x = rows.to(torch.float32)
    missing = -x.shape[1] % group
    if missing:
        x = F.pad(x[None], (0, missing), mode="replicate")[0]
    return x.unflatten(1, (-1, group))


def _around_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [out, groups, 1] of codes around zero; their offsets are zero."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return scale, torch.zeros_like(scale)


def _spanning(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [out, groups, 1]: for each group the span with the least error."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    scale, offset, least = _span(x, middle, half)
    for share in _SPANS[1:]:
        other, beginning, error = _span(x, middle, share * half)
        better = error < least
        scale, offset = torch.where(better, other, scale), torch.where(better, beginning, offset)
        least = torch.where(better, error, least)
    return scale, offset


def _span(x: Tensor, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset of the span middle - half to middle + half, and each group's error."""
    scale, offset = (half * (2 / 15)).bfloat16(), (middle - half).bfloat16()
    exact = (x - offset).mul_(_inverse(scale))
    error = exact.round().clamp_(0, 15).sub_(exact).square_().sum(-1, keepdim=True)
    return scale, offset, error * scale.float().square()


def _coded(x: Tensor, scale: Tensor, offset: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The nearest codes, as floats."""
    return (x - offset).mul_(_inverse(scale)).round_().clamp_(*bounds)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; where all weights of a group are the offset the scale is zero, and so is this."""
    return torch.where(scale == 0, 0.0, 1 / scale.float())
