"""What stands before a request's first token: trained keys and values, or trained embeddings.

peft saves both as they are used: projections and encoders have been run, only their result is in
the file.
"""

import msgspec
import numpy as np

from zoo.adapters.adapter import Adapter
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.errors import BadAdapter
from zoo.manifest import ObjectDigest, Prefix, SoftPrompt, attention_of
from zoo.sources.values import read_values

_NAME = "prompt_embeddings"


class PromptSettings(msgspec.Struct, frozen=True):
    """What counts of peft's settings of prompt learning."""

    num_virtual_tokens: int = 0
    num_transformer_submodules: int | None = 1


def place_prompt(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Prompt tuning, p-tuning and context-aware prompt tuning: vectors [n, hidden]."""
    length = _length(adapter)
    shape = adapter.tensors[_NAME].shape
    if shape != (length, ground.hidden):
        raise ground.misfit(adapter.source, _NAME, shape, str([length, ground.hidden]))
    draft.attach(0, SoftPrompt(ObjectDigest(_NAME), length))


def place_prefix(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Prefix tuning: [n, layers * 2 * KV width], for each layer its keys, then its values."""
    length = _length(adapter)
    attention = {
        unit: spec for unit, whole in enumerate(ground.specs) if (spec := attention_of(whole))
    }
    widths = [spec.kv_heads * spec.head_dim for spec in attention.values()]
    shape, wanted = adapter.tensors[_NAME].shape, (length, 2 * sum(widths))
    if shape != wanted or len(set(widths)) != 1:
        raise ground.misfit(adapter.source, _NAME, shape, str(list(wanted)))
    parts = np.split(read_values(adapter.tensors[_NAME]), 2 * len(attention), axis=1)
    for i, (unit, spec) in enumerate(attention.items()):
        keys, values = (
            draft.derive(
                f"{unit}.{name}", parts[2 * i + j].reshape(length, spec.kv_heads, spec.head_dim)
            )
            for j, name in enumerate(("keys", "values"))
        )
        draft.attach(unit, Prefix(keys, values, length))


def _length(adapter: Adapter) -> int:
    settings = adapter.read(PromptSettings)
    if (settings.num_transformer_submodules or 1) != 1:
        raise BadAdapter(f"{adapter.source} was made for a model of an encoder and a decoder")
    if set(adapter.tensors) != {_NAME}:
        odd = min(set(adapter.tensors) ^ {_NAME})
        raise BadAdapter(f"{adapter.source} should hold {_NAME!r} and nothing else: {odd!r} is odd")
    if settings.num_virtual_tokens < 1:
        raise BadAdapter(f"{adapter.source} has no virtual tokens")
    return settings.num_virtual_tokens
