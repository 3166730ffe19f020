"""What a family is: where each tensor of its checkpoints belongs, and what its config means.

A family is data: the module names of its architecture beside our roles, and one function that
turns a config into specs. Everything else here is derived from that, in both directions:
checkpoint tensor name <-> (unit, role), and the module path that an adapter names -> (unit, role).

Units are numbered along the chain: 0 the embedding, then each layer's attention and MLP (or the one
unit of both, where the family is `parallel`), last the head.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from zoo.errors import UnsupportedFamily
from zoo.manifest import (
    Activation,
    AttentionSpec,
    EmbedSpec,
    ForeignSpec,
    HeadSpec,
    MlpSpec,
    ParallelSpec,
    Spec,
)

# A transformers config: which attributes it has depends on the family.
Config: TypeAlias = Any
LayerSpecs: TypeAlias = tuple[AttentionSpec, MlpSpec] | tuple[ParallelSpec] | tuple[ForeignSpec]
Shapes: TypeAlias = dict[str, tuple[int, ...]]

TOKENS = "tokens.weight"
HEAD = "head.weight"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's or a module's place in a chain; `role` is "q.weight" for a tensor, "q" for a
    module."""

    unit: int
    role: str


@dataclass(frozen=True, slots=True)
class Design:
    """A config, read: the specs of the chain and what they leave open.

    `biased` are the modules that have a bias ("norm": every norm of the chain). `positions` is the
    number of learned positions. `layer_shapes` are the tensors of each layer where its spec does
    not say them.
    """

    embed: EmbedSpec
    layers: tuple[LayerSpecs, ...]
    head: HeadSpec
    biased: frozenset[str]
    tied: bool
    context: int
    positions: int = 0
    layer_shapes: tuple[Shapes, ...] = ()

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The chain's specs in order."""
        inner = [spec for layer in self.layers for spec in layer]
        return (self.embed, *inner, self.head)


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture. Module names are relative to `prefix`, those of layers to `layer` as well.

    `outside` are modules that never carry the prefix, `aliases` older names of modules.
    `ignored` are glob patterns of tensors that checkpoints may carry and the architecture does not
    read (kept for export only). `parallel` says that a layer is one unit, with the roles of both
    tables.
    """

    name: str
    model_types: tuple[str, ...]
    design: Callable[[Config], Design]
    embed: Mapping[str, str]
    attention: Mapping[str, str]
    mlp: Mapping[str, str]
    head: Mapping[str, str]
    prefix: str = "model."
    layer: str = "layers."
    outside: tuple[str, ...] = ("lm_head",)
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    parallel: bool = False

    @property
    def layer_units(self) -> tuple[Mapping[str, str], ...]:
        """Role -> module for each unit of a layer, in order."""
        return ({**self.attention, **self.mlp},) if self.parallel else (self.attention, self.mlp)

    def num_layers(self, num_units: int) -> int:
        """Layers of a chain of so many units."""
        return (num_units - 2) // len(self.layer_units)

    def module(self, path: str, num_layers: int) -> Place | None:
        """The linear layer, norm or embedding that a module path names, if there is one."""
        path = self.aliases.get(path, path)
        name = path if path in self.outside else path.removeprefix(self.prefix)
        match = re.fullmatch(re.escape(self.layer) + r"(0|[1-9]\d{0,5})\.(.+)", name)
        tables = self.layer_units
        if match is None:
            return _find({0: self.embed, 1 + len(tables) * num_layers: self.head}, name)
        index = int(match[1])
        if index >= num_layers:
            return None
        return _find(dict(enumerate(tables, 1 + len(tables) * index)), match[2])

    def tensor(self, name: str, num_layers: int) -> Place | None:
        """The weight or bias that a checkpoint's tensor name means, if there is one."""
        path, _, kind = name.rpartition(".")
        if kind not in {"weight", "bias"}:
            return None
        place = self.module(path, num_layers)
        return Place(place.unit, f"{place.role}.{kind}") if place else None

    def tensor_name(self, place: Place, num_layers: int) -> str:
        """The full checkpoint name of a weight or bias: the way back from `tensor`."""
        role, _, kind = place.role.rpartition(".")
        tables = self.layer_units
        if place.unit == 0:
            module = self.embed[role]
        elif place.unit == 1 + len(tables) * num_layers:
            module = self.head[role]
        else:
            index, part = divmod(place.unit - 1, len(tables))
            module = f"{self.layer}{index}.{tables[part][role]}"
        return f"{'' if module in self.outside else self.prefix}{module}.{kind}"

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint may carry this tensor although nothing reads it."""
        short = name.removeprefix(self.prefix)
        return any(fnmatchcase(short, pattern) for pattern in self.ignored)

    def shapes(self, design: Design) -> list[Shapes]:
        """The shape of every tensor of every unit, by role. All of them must be in a checkpoint,
        but for one side of a tied head."""
        layers = design.layer_shapes or [
            _layer_shapes(table, spec, design.biased)
            for layer in design.layers
            for table, spec in zip(self.layer_units, layer, strict=True)
            if not isinstance(spec, ForeignSpec)
        ]
        return [_embed_shapes(design), *layers, _head_shapes(self.head, design)]


def activation(name: str) -> Activation:
    """Our name of an activation function; raises UnsupportedFamily."""
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedFamily(f"the activation {name!r} is not supported: known are {known}")
    return _ACTIVATIONS[name]


def _find(tables: Mapping[int, Mapping[str, str]], name: str) -> Place | None:
    for unit, table in tables.items():
        for role, module in table.items():
            if module == name:
                return Place(unit, role)
    return None


def _embed_shapes(design: Design) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        TOKENS: (design.embed.vocabulary, design.embed.hidden),
    }
    if design.positions:
        shapes["positions.weight"] = (design.positions, design.embed.hidden)
    return shapes


def _layer_shapes(
    table: Mapping[str, str],
    spec: AttentionSpec | MlpSpec | ParallelSpec,
    biased: frozenset[str],
) -> dict[str, tuple[int, ...]]:
    vectors, matrices = layer_sizes(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for role in table:
        if role in vectors:
            shapes[f"{role}.weight"] = (vectors[role],)
            out = vectors[role]
        else:
            out, width = matrices[role]
            shapes[f"{role}.weight"] = (width, out) if spec.transposed else (out, width)
        if role in biased:
            shapes[f"{role}.bias"] = (out,)
    return shapes


def layer_sizes(
    spec: AttentionSpec | MlpSpec | ParallelSpec,
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Widths of the norms that a unit of a layer may have, and (out, in) of its linear layers."""
    if isinstance(spec, ParallelSpec):
        norms, below = layer_sizes(spec.attention)
        return {**norms, "mlp_norm": spec.mlp.hidden}, {**below, **layer_sizes(spec.mlp)[1]}
    hidden = spec.hidden
    around = {"norm": hidden, "post_norm": hidden}
    if isinstance(spec, MlpSpec):
        inner = spec.intermediate
        return around, {
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return around | {"q_norm": spec.head_dim, "k_norm": spec.head_dim}, {
        "q": (width, hidden),
        "k": (kv_width, hidden),
        "v": (kv_width, hidden),
        "qkv": (width + 2 * kv_width, hidden),
        "o": (hidden, width),
    }


def _head_shapes(table: Mapping[str, str], design: Design) -> dict[str, tuple[int, ...]]:
    spec = design.head
    shapes: dict[str, tuple[int, ...]] = {}
    for role in table:
        out = spec.vocabulary if role == "head" else spec.hidden
        shapes[f"{role}.weight"] = (out, spec.hidden) if role == "head" else (out,)
        if role in design.biased:
            shapes[f"{role}.bias"] = (out,)
    return shapes
