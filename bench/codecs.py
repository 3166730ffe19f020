"""Ways of keeping the difference of a matrix, as what they decode to and the bytes they take.

Only low-rank differences are served; the others are here to be measured against them. Pure.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoo.deltas.lowrank import factorize

# The decoded difference of a matrix [out, in], and bytes.
Coded = tuple[Tensor, int]

_GROUP = 64


def one_bit(change: Tensor) -> Coded:
    """Signs, and one scale per row in 16 bits (BitDelta, Liu et al. 2024, without its training)."""
    scale = change.abs().mean(1, keepdim=True).bfloat16().float()
    return torch.where(change >= 0, scale, -scale), change.numel() // 8 + 2 * change.shape[0]


def few_bit(change: Tensor, bits: int) -> Coded:
    """Evenly spaced levels between the extremes of groups of 64 columns, which take 16 bits."""
    groups = change.reshape(-1, _GROUP)
    largest = groups.abs().amax(1, keepdim=True).bfloat16().float()
    step = 2 * largest / (2**bits - 1)
    safe = step.clamp(min=torch.finfo(torch.float32).tiny)
    levels = ((groups + largest) / safe).round().clamp(0, 2**bits - 1)
    decoded = torch.where(step > 0, levels * step - largest, torch.zeros_like(groups))
    return decoded.reshape(change.shape), change.numel() * bits // 8 + 2 * len(groups)


def even_rank(change: Tensor, share: float) -> Coded:
    """The best rank that takes at most `share` of the matrix's bytes in 16 bits: every matrix gets
    the same share, whatever it would bring."""
    factors = factorize(change)
    rank = int(share * 2 * change.numel()) // factors.bytes_per_rank
    left, right = factors.cut(rank)
    return left.float() @ right.float(), rank * factors.bytes_per_rank


CODECS: Mapping[str, Callable[[Tensor], Coded]] = {
    "one bit per weight, a scale per row": one_bit,
    "two bits per weight, groups of 64": lambda change: few_bit(change, 2),
    "four bits per weight, groups of 64": lambda change: few_bit(change, 4),
    "equal share of ranks, 1/12": lambda change: even_rank(change, 1 / 12),
}
