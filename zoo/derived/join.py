"""Where two chains are joined, and what can be put between them before anything is trained.

The map is linear but for one term: the stream holds where it stands. The first token's activations
are many times as large as all others' in most models, whatever the token is, and what learned or
attended positions leave there differs between models; a map of the whole stream alone would spend
itself on that one position. So each power of two of positions has a vector of its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derived.cut import layers_of
from zoo.derived.network import Network, Part, buckets
from zoo.errors import UnsupportedOption
from zoo.manifest import StitchSpec

BUCKETS = 12
# Ridges of the fit: for channels, whose mean square is about 1, and next to none for positions.
_RIDGE, _LEAST_RIDGE = 1e-3, 1e-9


@dataclass(frozen=True, slots=True)
class Join:
    """The first `below` layers of one chain, then the other chain from its layer `above` on."""

    below: int
    above: int

    def __str__(self) -> str:
        return f"{self.below}:{self.above}"


def read_joins(text: str | None, lower: Network, upper: Network) -> list[Join]:
    """Joins as "BELOW:ABOVE,...", by default at a quarter, half and three quarters of both chains.
    Raises UnsupportedOption."""
    below, above = _num_layers(lower), _num_layers(upper)
    if text is None:
        quarters = [(max(1, below * n // 4), min(above - 1, above * n // 4)) for n in (1, 2, 3)]
        return [Join(*pair) for pair in dict.fromkeys(quarters)]
    joins: list[Join] = []
    for piece in text.split(","):
        first, _, second = piece.partition(":")
        if not (first.strip().isdecimal() and second.strip().isdecimal()):
            raise UnsupportedOption(
                f"--at {text!r} is not a list of joins: give it as BELOW:ABOVE,... in layers"
            )
        join = Join(int(first), int(second))
        if not (1 <= join.below <= below and 0 <= join.above < above):
            raise UnsupportedOption(
                f"a join at {join} cannot be: the chains have {below} and {above} layers"
            )
        joins.append(join)
    return joins


def joined(lower: Network, upper: Network, join: Join, stitch: Part) -> Network:
    """The chain that goes over a stitch."""
    under = layers_of([part.spec for part in lower.parts])[join.below - 1].last
    over = layers_of([part.spec for part in upper.parts])[join.above].first
    return Network([*lower.parts[:under], stitch, *upper.parts[over:]])


def streams(lower: Network, upper: Network, join: Join, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The stream on both sides of a join, each of its own chain."""
    under = layers_of([part.spec for part in lower.parts])[join.below - 1].last
    over = layers_of([part.spec for part in upper.parts])[join.above].first
    return lower.hidden(ids, under), upper.hidden(ids, over)


def identity(hidden: int, width: int) -> Part:
    """Channels as they are; those that the other side lacks are dropped or stay zero."""
    return _part(torch.eye(width, hidden), torch.zeros(BUCKETS, width))


def untrained(hidden: int, width: int, seed: int) -> Part:
    """A random map that keeps the size of the stream."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, hidden, generator=generator) / hidden**0.5
    return _part(weight, torch.zeros(BUCKETS, width))


def fitted(pairs: list[tuple[Tensor, Tensor]]) -> Part:
    """The stitch that is nearest in least squares: [batch, length, hidden] -> [.., width].

    Each position counts by what the norms above see of it, so both streams are divided by the size
    of the one that is wanted."""
    hidden, width = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    ridges = [_RIDGE] * hidden + [_LEAST_RIDGE] * BUCKETS
    square = torch.tensor(ridges, dtype=torch.float64).diag()
    product = torch.zeros(hidden + BUCKETS, width, dtype=torch.float64)
    for given, wanted in pairs:
        size = wanted.float().square().mean(-1, keepdim=True).sqrt()
        places = F.one_hot(buckets(given.shape[1], BUCKETS), BUCKETS).expand(len(given), -1, -1)
        features = (torch.cat((given.float(), places), dim=-1) / size).flatten(0, 1).double()
        square += features.T @ features
        product += features.T @ (wanted.float() / size).flatten(0, 1).double()
    solved = torch.linalg.solve(square, product).float()
    return _part(solved[:hidden].T.contiguous(), solved[hidden:].contiguous())


def _part(weight: Tensor, positions: Tensor) -> Part:
    width, hidden = weight.shape
    tensors = {
        "map.weight": weight,
        "map.bias": torch.zeros(width),
        "positions.weight": positions,
    }
    return Part(StitchSpec(hidden, width, BUCKETS), tensors)


def _num_layers(network: Network) -> int:
    return len(layers_of([part.spec for part in network.parts]))
