"""Adapters that no piece can say: merged into the base's weights by peft itself, in float32. What
changed becomes tensors of the variant's own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from zoo.adapters.adapter import Adapter
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.whole import agree_vocabulary, put_tensor
from zoo.errors import BadAdapter
from zoo.sources.values import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

_MERGED = "merged/"


def place_merged(adapter: Adapter, ground: Ground, merged: "Mapping[str, Tensor]") -> Draft:
    """What the merged model's weights, by their names, have changed of the base."""
    draft = Draft()
    for name, weight in merged.items():
        place = ground.family.tensor(name, ground.num_layers)
        if place is None:
            if ground.family.is_ignored(name):
                continue
            raise BadAdapter(
                f"{adapter.source} leaves {name!r} in the merged model, which {ground.name!r} does "
                "not have: it cannot be merged"
            )
        values = weight.float().numpy()
        own = ground.values(place.unit, place.role)
        if own is None or not np.array_equal(own, values):
            label = f"{_MERGED}{name}"
            draft.derived[label] = as_tensor(values)
            put_tensor(ground, draft, place, label, draft.derived[label])
    draft.vocabulary = agree_vocabulary(adapter, ground, draft)
    return draft


def merged_bytes(draft: Draft) -> int:
    """What the merging costs: bytes of the tensors that are now the variant's own."""
    return sum(tensor.data.nbytes for tensor in draft.derived.values())
