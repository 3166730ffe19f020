"""Tensors that an adapter brings whole: norms and biases as pieces upon shared units, the rest as
units of its own."""

from collections.abc import Mapping

import numpy as np

from zoo.adapters.adapter import Adapter, module_path
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.errors import BadAdapter
from zoo.families.family import HEAD, TOKENS, Place
from zoo.manifest import Bias, ForeignSpec, NormWeights, ObjectDigest
from zoo.sources.values import read_values
from zoo.sources.weights import SourceTensor
from zoo.store import tensor_digest

NORMS = frozenset({"norm", "mlp_norm", "q_norm", "k_norm", "post_norm"})
# peft's names for a module that it put something around.
_WRAPPINGS = (
    ".base_layer",
    ".modules_to_save.default",
    ".modules_to_save",
    ".ln_tuning_layers.default",
    ".ln_tuning_layers",
    ".token_adapter",
)


def place_whole(adapter: Adapter, ground: Ground, draft: Draft, name: str) -> None:
    """Put one whole tensor in its place, unless the base has the very same there."""
    path = module_path(name)
    for wrapping in _WRAPPINGS:
        path = path.replace(f"{wrapping}.", ".")
    place = ground.family.tensor(path, ground.num_layers)
    if place is None:
        raise ground.stranger(adapter.source, path)
    tensor = adapter.tensors[name]
    known = ground.shapes[place.unit].get(place.role) or _vector_shape(ground, place)
    if known is None:
        raise ground.stranger(adapter.source, path)
    # An embedding or a head may have gained tokens; everything else keeps its shape.
    fixed = 1 if place.role in {TOKENS, HEAD} else 0
    if len(tensor.shape) != len(known) or tensor.shape[fixed:] != known[fixed:]:
        raise ground.misfit(adapter.source, name, tensor.shape, str(list(known)))
    put_tensor(ground, draft, place, name, tensor)


def put_tensor(ground: Ground, draft: Draft, place: Place, name: str, tensor: SourceTensor) -> None:
    """A tensor of this name in place of the base's: as a piece where a piece can say it."""
    digest = tensor_digest(tensor.dtype, tensor.shape, tensor.data)
    if digest == ground.digest(place.unit, place.role):
        return
    role, _, kind = place.role.rpartition(".")
    if role in NORMS:
        _put_norm(ground, draft, Place(place.unit, role), kind, ObjectDigest(name))
    elif kind == "bias" and _is_linear(ground, Place(place.unit, role)):
        put_bias(draft, place.unit, role, ObjectDigest(name))
    else:
        draft.replace(place.unit, place.role, name)


def put_bias(draft: Draft, unit: int, role: str, name: ObjectDigest) -> None:
    """A bias of a linear layer, in place of one that was put there before."""
    pieces = draft.pieces.setdefault(unit, [])
    pieces[:] = [piece for piece in pieces if not _is_bias(piece, role)]
    pieces.append(Bias(role, name))


def bias_values(adapter: Adapter, ground: Ground, draft: Draft, place: Place) -> np.ndarray | None:
    """The bias that a linear layer has so far: the draft's, else the base's, else None."""
    for piece in draft.pieces.get(place.unit, ()):
        if isinstance(piece, Bias) and piece.role == place.role:
            brought = draft.derived.get(piece.vector) or adapter.tensors[piece.vector]
            return read_values(brought)
    return ground.values(place.unit, f"{place.role}.bias")


def agree_vocabulary(adapter: Adapter, ground: Ground, draft: Draft) -> int:
    """Tokens of embedding and head, which must still agree."""
    sizes: list[int] = []
    for unit, role in ((0, TOKENS), (ground.head, HEAD)):
        name = draft.whole.get(unit, {}).get(role)
        tensor = draft.derived.get(name) or adapter.tensors[name] if name else None
        sizes.append((tensor.shape if tensor else ground.shapes[unit][role])[0])
    if sizes[0] != sizes[1]:
        raise BadAdapter(
            f"{adapter.source} would leave an embedding of {sizes[0]} tokens and a head of "
            f"{sizes[1]}: save both in modules_to_save"
        )
    return sizes[0]


def _put_norm(ground: Ground, draft: Draft, place: Place, kind: str, name: ObjectDigest) -> None:
    pieces = draft.pieces.setdefault(place.unit, [])
    parts: Mapping[str, ObjectDigest | None] = {
        part: ground.digest(place.unit, f"{place.role}.{part}") for part in ("weight", "bias")
    }
    for piece in pieces:
        if isinstance(piece, NormWeights) and piece.role == place.role:
            parts = {"weight": piece.weight, "bias": piece.bias}
            pieces.remove(piece)
            break
    weight = name if kind == "weight" else parts["weight"]
    assert weight is not None, "a base's norm has a weight"
    bias = name if kind == "bias" else parts["bias"]
    pieces.append(NormWeights(place.role, weight, bias))


def _vector_shape(ground: Ground, place: Place) -> tuple[int, ...] | None:
    """The shape of a bias that the base's linear layer lacks and a piece can give it."""
    role, _, kind = place.role.rpartition(".")
    if kind != "bias" or f"{role}.weight" not in ground.shapes[place.unit]:
        return None
    if not _is_linear(ground, Place(place.unit, role)):
        return None
    return (ground.widths(Place(place.unit, role))[1],) if role != "tokens" else None


def _is_linear(ground: Ground, place: Place) -> bool:
    """Whether the module with a weight at `place` multiplies by it."""
    spec = ground.units[place.unit].spec
    return place.role in spec.linears if isinstance(spec, ForeignSpec) else place.role not in NORMS


def _is_bias(piece: object, role: str) -> bool:
    return isinstance(piece, Bias) and piece.role == role
