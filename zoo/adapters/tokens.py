"""Trained rows of single tokens, of the embedding or of the head."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from zoo.adapters.adapter import Adapter, module_path
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.whole import place_whole
from zoo.errors import BadAdapter
from zoo.manifest import TokenRows
from zoo.sources.values import read_values

TOKEN_ROWS = ".trainable_tokens_delta"
Indices = Sequence[int] | Mapping[str, Sequence[int]] | None


class TokenSettings(msgspec.Struct, frozen=True):
    """What counts of a TrainableTokensConfig."""

    token_indices: list[int] = []


def place_trainable_tokens(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """An adapter that is nothing but rows (and whole modules, if it has any)."""
    indices = adapter.read(TokenSettings).token_indices
    for name in adapter.tensors:
        if name.endswith(TOKEN_ROWS):
            place_token_rows(adapter, ground, draft, name, indices)
        else:
            place_whole(adapter, ground, draft, name)


def place_token_rows(
    adapter: Adapter, ground: Ground, draft: Draft, name: str, indices: Indices
) -> None:
    """Put rows [n, hidden] in place of those that the settings' `indices` name."""
    path = module_path(name).removesuffix(TOKEN_ROWS).removesuffix(".token_adapter")
    place = ground.module(adapter.source, path)
    if place.role not in {"tokens", "head"}:
        raise ground.stranger(adapter.source, path)
    ids = np.asarray(_ids_of(adapter, path, indices), np.int64)
    rows = adapter.tensors[name]
    if rows.shape != (len(ids), ground.hidden):
        wanted = str([len(ids), ground.hidden])
        raise ground.misfit(adapter.source, name, rows.shape, wanted)
    if len(set(ids.tolist())) != len(ids) or not len(ids) or ids.min() < 0:
        raise BadAdapter(f"{adapter.source} trains tokens {ids.tolist()}: each must be named once")
    order = np.argsort(ids)
    held_ids = draft.derive(f"{path}.ids", ids[order])
    held_rows = draft.derive(f"{path}.rows", read_values(rows)[order])
    draft.attach(place.unit, TokenRows(place.role, held_ids, held_rows))
    if place.role == "tokens" and ground.is_tied and not _has_own_head(indices, path):
        draft.attach(ground.head, TokenRows("head", held_ids, held_rows))


def _ids_of(adapter: Adapter, path: str, indices: Indices) -> Sequence[int]:
    """The token ids of one table; a mapping names tables by the end of their path."""
    if isinstance(indices, Mapping):
        found = [ids for key, ids in indices.items() if path.endswith(key)]
        if len(found) == 1:
            return found[0]
    elif indices:
        return indices
    raise BadAdapter(f"{adapter.source} holds rows of {path!r} and does not say of which tokens")


def _has_own_head(indices: Indices, path: str) -> bool:
    """Whether a tied head was given other tokens than the embedding: then peft parts them."""
    if not isinstance(indices, Mapping) or len(indices) < 2:
        return False
    own = [list(ids) for key, ids in indices.items() if path.endswith(key)]
    return any(list(ids) != own[0] for ids in indices.values())
