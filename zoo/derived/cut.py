"""Which parts of a chain a pruned one keeps, and how much of it each may keep. Pure.

Layers, whole KV groups (a KV head with the query heads that read it) and MLP neurons go; all layers
that stay keep as many groups and neurons as each other, so that one page fits all layers and
transformers' configs can describe the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.errors import UnsupportedFamily, UnsupportedOption
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, ParallelSpec, Spec

# Shares of the cut that layers take, as powers of the ratio: half of them ... all of them.
_DEPTHS = (0.5, 0.75, 1.0)
_NEURONS_STEP = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """The units [first, last) of a layer, and what it has of each kind."""

    first: int
    last: int
    attention: AttentionSpec
    mlp: MlpSpec

    @property
    def group_weights(self) -> int:
        """Weights of one KV group."""
        spec = self.attention
        heads = spec.heads // spec.kv_heads
        return 2 * spec.hidden * spec.head_dim * (heads + 1)

    @property
    def neuron_weights(self) -> int:
        """Weights of one neuron."""
        return self.mlp.hidden * (3 if self.mlp.gated else 2)

    @property
    def weights(self) -> int:
        """Weights of the layer's matrices."""
        groups = self.attention.kv_heads * self.group_weights
        return groups + self.mlp.intermediate * self.neuron_weights


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is kept: layers, and of each of them KV groups and neurons."""

    layers: int
    groups: int
    neurons: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept: layers by number, and for each of them its groups and neurons, ascending."""

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]


def layers_of(specs: Sequence[Spec]) -> list[Layer]:
    """The layers of a chain; raises UnsupportedFamily for one that is built otherwise."""
    found: list[Layer] = []
    at = 1
    while at < len(specs) - 1:
        spec, above = specs[at], specs[at + 1]
        if isinstance(spec, ParallelSpec):
            found.append(Layer(at, at + 1, spec.attention, spec.mlp))
        elif isinstance(spec, AttentionSpec) and isinstance(above, MlpSpec):
            found.append(Layer(at, at + 2, spec, above))
        else:
            raise _unsupported(spec)
        at = found[-1].last
    if not isinstance(specs[0], EmbedSpec) or not isinstance(specs[-1], HeadSpec):
        raise _unsupported(specs[0])
    return found


def shapes(layers: Sequence[Layer], ratio: float) -> list[Shape]:
    """Shapes that keep at most `ratio` of the layers' weights, and nearly as much: from wide and
    flat to narrow and deep. Raises UnsupportedOption where none can be."""
    if not 0 < ratio < 1:
        raise UnsupportedOption(f"--ratio {ratio:g} is out of range: give a share between 0 and 1")
    one, count = layers[0], len(layers)
    budget = ratio * sum(layer.weights for layer in layers)
    found: list[Shape] = []
    for depth in _DEPTHS:
        kept = max(1, min(count, round(count * ratio**depth)))
        share = budget / (kept * one.weights)
        for groups in sorted({one.attention.kv_heads, _groups(one, share)}, reverse=True):
            left = budget / kept - groups * one.group_weights
            neurons = min(one.mlp.intermediate, _stepped(int(left / one.neuron_weights)))
            if neurons > 0 and Shape(kept, groups, neurons) not in found:
                found.append(Shape(kept, groups, neurons))
    if not found:
        raise UnsupportedOption(
            f"--ratio {ratio:g} leaves not even one layer of {count}: give a larger share"
        )
    return found


def _groups(layer: Layer, share: float) -> int:
    return max(1, min(layer.attention.kv_heads, round(layer.attention.kv_heads * share)))


def _stepped(neurons: int) -> int:
    """A multiple that kernels like, where there are enough of them."""
    step = _NEURONS_STEP if neurons >= 4 * _NEURONS_STEP else 1
    return neurons // step * step


def _unsupported(spec: Spec) -> UnsupportedFamily:
    return UnsupportedFamily(
        f"a chain with a unit of the kind {type(spec).__name__} here cannot be pruned: its layers "
        "must be an attention and an MLP unit, or one unit of both"
    )
