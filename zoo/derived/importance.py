"""What the parts of a network are worth, measured on text: layers, KV groups, neurons, directions.

Layers by what leaving them out does to the next token's distribution; KV groups and neurons by how
much they add to the stream; directions by how much of the normed stream lies in them.
"""

import random
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derived.cut import Cut, Layer, Shape, layers_of
from zoo.derived.network import Network, activated, attended, increment
from zoo.manifest import AttentionSpec, MlpSpec, ParallelSpec
from zoo.progress import Progress

_ROUNDS = 4
# Positions at which distributions are compared: every so manieth.
_POSITION_STEP = 4


class Importance:
    """Measures a network on a few chunks of text, ids [chunks, length]."""

    def __init__(self, network: Network, ids: Tensor) -> None:
        self._network = network
        self._ids = ids
        self.layers: list[Layer] = layers_of([part.spec for part in network.parts])
        self.groups = torch.zeros(len(self.layers), self.layers[0].attention.kv_heads)
        self.neurons = torch.zeros(len(self.layers), self.layers[0].mlp.intermediate)
        self._gram = torch.zeros(0)
        self._truth = torch.zeros(0)
        self._measure()

    def cut(self, shape: Shape, removed: Sequence[int]) -> Cut:
        """The cut of a shape that keeps what is worth most; `removed` are layers in the order in
        which they can be spared."""
        spared = set(removed[: len(self.layers) - shape.layers])
        kept = tuple(n for n in range(len(self.layers)) if n not in spared)
        return Cut(
            layers=kept,
            groups=tuple(_best(self.groups[n], shape.groups) for n in kept),
            neurons=tuple(_best(self.neurons[n], shape.neurons) for n in kept),
        )

    @torch.inference_mode()
    def spare(self, count: int, progress: Progress) -> list[int]:
        """`count` layers in the order in which they can be spared, chosen in a few rounds: what a
        layer is worth depends on which others are left."""
        spared: list[int] = []
        rounds = min(_ROUNDS, count)
        for turn in progress.track(range(rounds), "measuring layers"):
            wanted = round(count * (turn + 1) / rounds) - len(spared)
            losses = self._losses_without_each(frozenset(spared))
            spared += sorted(losses, key=lambda number: losses[number])[:wanted]
        return spared

    @torch.inference_mode()
    def loss(self, network: Network) -> float:
        """How far another network is from this one: KL per position, in nats."""
        logits = network.head(network.hidden(self._ids, len(network) - 1)[:, ::_POSITION_STEP])
        return self._distance(logits)

    def directions(self, width: int) -> Tensor:
        """The `width` orthonormal directions [hidden, width] that hold most of the normed
        stream."""
        return torch.linalg.eigh(self._gram).eigenvectors.flip(1)[:, :width].float().contiguous()

    @torch.inference_mode()
    def _measure(self) -> None:
        x = self._network.embed(self._ids)
        self._gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
        for number, layer in enumerate(self.layers):
            for part in self._network.parts[layer.first : layer.last]:
                self._gram += _gram(x)
                spec = part.spec
                if isinstance(spec, AttentionSpec | ParallelSpec):
                    inner = attended(layer.attention, part.weights, x)
                    self.groups[number] = _group_worth(layer.attention, part.weights, inner)
                if isinstance(spec, MlpSpec | ParallelSpec):
                    norm = "mlp_norm" if isinstance(spec, ParallelSpec) else "norm"
                    inner = activated(layer.mlp, part.weights, x, norm)
                    out = _matrix(layer.mlp.transposed, part.weights["down.weight"])
                    self.neurons[number] = _power(inner) * out.float().square().sum(0)
                x = x + increment(part, x)
        self._gram += _gram(x)
        self._truth = F.log_softmax(self._network.head(x[:, ::_POSITION_STEP]), dim=-1)

    def _losses_without_each(self, spared: frozenset[int]) -> dict[int, float]:
        """Per layer that is left: the distance once it goes too."""
        left = [n for n in range(len(self.layers)) if n not in spared]
        x = self._network.embed(self._ids)
        losses: dict[int, float] = {}
        for place, number in enumerate(left):
            y = x
            for above in left[place + 1 :]:
                y = self._run(above, y)
            losses[number] = self._distance(self._network.head(y[:, ::_POSITION_STEP]))
            x = self._run(number, x)
        return losses

    def _run(self, number: int, x: Tensor) -> Tensor:
        layer = self.layers[number]
        return self._network.advance(x, layer.first, layer.last)

    def _distance(self, logits: Tensor) -> float:
        other = F.log_softmax(logits, dim=-1)
        kl = F.kl_div(other, self._truth, log_target=True, reduction="sum")
        return kl.item() / self._truth[..., 0].numel()


def at_random(layers: Sequence[Layer], shape: Shape, seed: int) -> Cut:
    """A cut of the same shape that knows nothing: the trivial choice."""
    chance = random.Random(seed)
    first = layers[0]

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(of), count)))

    return Cut(
        layers=some(shape.layers, len(layers)),
        groups=tuple(some(shape.groups, first.attention.kv_heads) for _ in range(shape.layers)),
        neurons=tuple(some(shape.neurons, first.mlp.intermediate) for _ in range(shape.layers)),
    )


def directions_at_random(hidden: int, width: int, seed: int) -> Tensor:
    """Orthonormal directions [hidden, width] that know nothing."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, :width].float().contiguous()


def _best(worth: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(worth.argsort(descending=True, stable=True)[:count].tolist()))


def _group_worth(spec: AttentionSpec, weights: Mapping[str, Tensor], inner: Tensor) -> Tensor:
    """How much each KV group adds to the stream."""
    out = _matrix(spec.transposed, weights["o.weight"]).unflatten(1, (spec.kv_heads, -1))
    parts = inner.unflatten(-1, (spec.kv_heads, -1))
    return torch.stack([_power(parts[..., g, :] @ out[:, g].T).sum() for g in range(spec.kv_heads)])


def _matrix(transposed: bool, weight: Tensor) -> Tensor:
    """A matrix as [out, in]."""
    return weight.T if transposed else weight


def _power(x: Tensor) -> Tensor:
    """The mean square of each channel."""
    return x.float().square().flatten(0, -2).mean(0)


def _gram(x: Tensor) -> Tensor:
    """Sum over positions of the outer product of the stream at the size that norms give it."""
    flat = F.rms_norm(x.float(), (x.shape[-1],)).flatten(0, 1)
    return (flat.T @ flat).double()
