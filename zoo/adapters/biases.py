"""BEFT: a learned bias added to what linear layers give."""

from zoo.adapters.adapter import Adapter, module_path
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.whole import bias_values, place_whole, put_bias
from zoo.sources.values import read_values

_ADDED = ".beft_bias"


def place_beft(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Put every bias on its base; raises BadAdapter for the first without a place."""
    for name in adapter.tensors:
        path = module_path(name).removesuffix(".default")
        if not path.endswith(_ADDED):
            place_whole(adapter, ground, draft, name)
            continue
        place = ground.module(adapter.source, path.removesuffix(_ADDED))
        out = ground.widths(place)[1]
        added = read_values(adapter.tensors[name]).reshape(-1)
        if place.role == "tokens" or added.shape != (out,):
            found = adapter.tensors[name].shape
            raise ground.misfit(adapter.source, name, found, str([out, 1]))
        if added.any():
            own = bias_values(adapter, ground, draft, place)
            whole = draft.derive(f"{path}.whole", added if own is None else own + added)
            put_bias(draft, place.unit, place.role, whole)
