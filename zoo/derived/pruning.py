"""Takes from a network what a cut leaves out: smaller tensors, and specs that say so.

Also narrows a network to another width: the stream is turned to its main directions (after Ashkboos
et al. 2024, arXiv:2401.15024) and the least of them are left out.
"""

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from zoo.derived.cut import Cut, Layer, layers_of
from zoo.derived.network import Network, Part
from zoo.errors import UnsupportedFamily
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, Norm, ParallelSpec, Spec

# Linear layers that read the stream, and those that add to it.
_READS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "head")
_ADDS = ("o", "down")


def prune(network: Network, cut: Cut) -> Network:
    """The network that a cut leaves; embedding and head stay as they are."""
    layers = layers_of([part.spec for part in network.parts])
    parts = [network.parts[0]]
    for number, groups, neurons in zip(cut.layers, cut.groups, cut.neurons, strict=True):
        layer = layers[number]
        theirs = network.parts[layer.first : layer.last]
        parts += [_pruned(part, layer, groups, neurons) for part in theirs]
    return Network([*parts, network.parts[-1]])


def narrow(network: Network, directions: Tensor) -> Network:
    """The network over a stream of directions.shape[1] channels; `directions` [hidden, width] has
    orthonormal columns. Exact where the stream has nothing outside of them. Raises
    UnsupportedFamily where norms see single channels in another way than RMS norms do."""
    return Network([_narrowed(part, directions) for part in network.parts])


def _pruned(part: Part, layer: Layer, groups: tuple[int, ...], neurons: tuple[int, ...]) -> Part:
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    if isinstance(part.spec, AttentionSpec | ParallelSpec):
        _take_groups(layer.attention, torch.tensor(groups), rows, columns)
    if isinstance(part.spec, MlpSpec | ParallelSpec):
        _take_neurons(layer.mlp, torch.tensor(neurons), rows, columns)
    weights = {
        role: _taken(part.spec, role, tensor, rows, columns)
        for role, tensor in part.weights.items()
    }
    return Part(_smaller(part.spec, len(groups), len(neurons)), weights)


def _take_groups(
    spec: AttentionSpec, groups: Tensor, rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> None:
    """Which outputs of q, k and v and which inputs of o these KV groups have."""
    each = spec.heads // spec.kv_heads
    heads = (groups[:, None] * each + torch.arange(each)).flatten()
    q, kv = _elements(heads, spec.head_dim), _elements(groups, spec.head_dim)
    columns["o"] = q
    if not spec.fused:
        rows.update(q=q, k=kv, v=kv)
    elif spec.grouped:
        rows["qkv"] = _elements(groups, (each + 2) * spec.head_dim)
    else:
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        rows["qkv"] = torch.cat((q, width + kv, width + kv_width + kv))


def _take_neurons(
    spec: MlpSpec, neurons: Tensor, rows: dict[str, Tensor], columns: dict[str, Tensor]
) -> None:
    columns["down"] = neurons
    if spec.fused:
        rows["gate_up"] = torch.cat((neurons, spec.intermediate + neurons))
    else:
        rows.update(gate=neurons, up=neurons)


def _taken(
    spec: Spec,
    role: str,
    tensor: Tensor,
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
) -> Tensor:
    linear, _, kind = role.rpartition(".")
    out, into = (1, 0) if _is_transposed(spec) and tensor.dim() == 2 else (0, 1)
    if linear in rows:
        tensor = tensor.index_select(out, rows[linear])
    if linear in columns and kind == "weight":
        tensor = tensor.index_select(into, columns[linear])
    return tensor.contiguous()


def _smaller(spec: Spec, groups: int, neurons: int) -> Spec:
    match spec:
        case AttentionSpec():
            heads = spec.heads // spec.kv_heads * groups
            return msgspec.structs.replace(spec, heads=heads, kv_heads=groups)
        case MlpSpec():
            return msgspec.structs.replace(spec, intermediate=neurons)
        case ParallelSpec():
            attention = _smaller(spec.attention, groups, neurons)
            mlp = _smaller(spec.mlp, groups, neurons)
            assert isinstance(attention, AttentionSpec)
            assert isinstance(mlp, MlpSpec)
            return ParallelSpec(attention, mlp)
        case _:
            return spec


def _elements(items: Tensor, width: int) -> Tensor:
    """The elements of items that are `width` wide each."""
    return (items[:, None] * width + torch.arange(width)).flatten()


def _is_transposed(spec: Spec) -> bool:
    return isinstance(spec, AttentionSpec | MlpSpec | ParallelSpec) and spec.transposed


def _narrowed(part: Part, directions: Tensor) -> Part:
    hidden, width = directions.shape
    spec = part.spec
    if isinstance(spec, EmbedSpec):
        weights = {
            role: (tensor.float() @ directions).to(tensor.dtype)
            for role, tensor in part.weights.items()
        }
        return Part(msgspec.structs.replace(spec, hidden=width), weights)
    if not isinstance(spec, AttentionSpec | MlpSpec | HeadSpec) or not _is_plain(spec):
        raise UnsupportedFamily(
            "only chains whose every norm is an RMS norm of the stream can be narrowed: leave "
            "--width at 1"
        )
    gains = part.weights["norm.weight"].float() + spec.norm.offset
    weights = dict(part.weights)
    for role, tensor in part.weights.items():
        linear, _, kind = role.rpartition(".")
        if kind == "weight" and linear in _READS:
            weights[role] = ((tensor.float() * gains) @ directions).to(tensor.dtype)
        elif linear in _ADDS:
            weights[role] = (directions.T @ tensor.float()).to(tensor.dtype)
    # The root of a mean over fewer channels is larger by this much.
    level = (hidden / width) ** 0.5
    weights["norm.weight"] = torch.full((width,), 1 / level - spec.norm.offset)
    return Part(msgspec.structs.replace(spec, hidden=width), weights)


def _is_plain(spec: AttentionSpec | MlpSpec | HeadSpec) -> bool:
    """Whether the stream is only read through an RMS norm and matrices as [out, in]."""
    norms: list[Norm | None] = [spec.norm]
    if not isinstance(spec, HeadSpec):
        norms.append(spec.post_norm)
        if spec.transposed:
            return False
    return norms[0] is not None and norms[0].kind == "rms" and norms[1:] in ([], [None])
