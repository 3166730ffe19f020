"""IA3: learned factors on what linear layers give, or on what they read."""

import numpy as np

from zoo.adapters.adapter import Adapter, module_path
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.whole import bias_values, place_whole, put_bias
from zoo.families.family import Place
from zoo.manifest import Gain, InputGain
from zoo.sources.values import read_values

_FACTOR = ".ia3_l"
_OUTPUTS = frozenset({"o", "down"})


def place_ia3(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Put every factor on its base; raises BadAdapter for the first without a place."""
    factors = [name for name in adapter.tensors if _is_factor(name)]
    for name in adapter.tensors:
        if name not in factors:
            place_whole(adapter, ground, draft, name)
    for name in factors:
        path = module_path(name).removesuffix(".default").removesuffix(_FACTOR)
        place = ground.module(adapter.source, path)
        wide, out = ground.widths(place)
        shape = adapter.tensors[name].shape
        if place.role == "tokens" or shape not in {(out, 1), (1, wide)}:
            wanted = f"{[out, 1]} or {[1, wide]}"
            raise ground.misfit(adapter.source, name, shape, wanted)
        factor = read_values(adapter.tensors[name]).reshape(-1)
        if (factor == 1).all():
            continue
        if shape == (out, 1):
            _scale_outputs(adapter, ground, draft, place, factor)
        else:
            _scale_inputs(ground, draft, place, factor)


def _is_factor(name: str) -> bool:
    return name.removesuffix(".default").endswith(_FACTOR)


def _scale_outputs(
    adapter: Adapter, ground: Ground, draft: Draft, place: Place, factor: np.ndarray
) -> None:
    """factor * (W x + bias): the bias is scaled once and for all."""
    label = f"{place.unit}.{place.role}"
    draft.attach(place.unit, Gain(place.role, draft.derive(f"{label}.gain", factor)))
    bias = bias_values(adapter, ground, draft, place)
    if bias is not None:
        put_bias(draft, place.unit, place.role, draft.derive(f"{label}.bias", factor * bias))


def _scale_inputs(ground: Ground, draft: Draft, place: Place, factor: np.ndarray) -> None:
    """W (factor * x): on the way into an output layer, else in a weight of its own."""
    label = f"{place.unit}.{place.role}"
    if place.role in _OUTPUTS:
        draft.attach(place.unit, InputGain(place.role, draft.derive(f"{label}.input", factor)))
        return
    weight = ground.matrix(place) * factor
    held = weight.T if ground.is_transposed(place.unit) else weight
    draft.replace(place.unit, f"{place.role}.weight", draft.derive(f"{label}.weight", held))
