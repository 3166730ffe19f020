"""The config.json of a pruned model, for transformers: the true model's with other numbers.

It is read back by the family itself: a shape that the config cannot say gives no config, and the
variant is then served but not exported.
"""

import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from zoo.errors import ZooError
from zoo.families.registry import family_named
from zoo.manifest import AttentionSpec, MlpSpec, ParallelSpec, Spec
from zoo.sources.checkpoint import design_of

# Names of the same number in the configs of different architectures.
_LAYERS = ("num_hidden_layers", "n_layer")
_WIDTHS = ("intermediate_size", "n_inner")
_PER_LAYER = ("layer_types",)


def config_of(
    true: bytes, family: str, specs: Sequence[Spec], kept: Sequence[int], *, tied: bool
) -> bytes | None:
    """A config that says `specs`, made from the true model's; `kept` are its layers that stayed,
    `tied` whether the head is the embedding."""
    settings: dict[str, Any] = json.loads(true)
    attention, mlp = _halves(specs)
    settings["tie_word_embeddings"] = tied
    _set(settings, _LAYERS, len(kept))
    _set(settings, _WIDTHS, mlp.intermediate)
    settings |= {"hidden_size": attention.hidden, "head_dim": attention.head_dim}
    settings |= {"num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads}
    for name in _PER_LAYER:
        if isinstance(settings.get(name), list):
            settings[name] = [settings[name][layer] for layer in kept]
    return _checked(settings, family, specs)


def _checked(settings: dict[str, Any], family: str, specs: Sequence[Spec]) -> bytes | None:
    kind = str(settings.pop("model_type"))
    try:
        design = design_of(family_named(family), AutoConfig.for_model(kind, **settings))
    except (ZooError, StrictDataclassError, ValueError, TypeError, AttributeError):
        return None
    if design.specs != tuple(specs):
        return None
    return json.dumps({"model_type": kind, **settings}, indent=2).encode()


def _halves(specs: Sequence[Spec]) -> tuple[AttentionSpec, MlpSpec]:
    """The first layer's attention and MLP."""
    first, second = specs[1], specs[2]
    if isinstance(first, ParallelSpec):
        return first.attention, first.mlp
    assert isinstance(first, AttentionSpec)
    assert isinstance(second, MlpSpec)
    return first, second


def _set(settings: dict[str, Any], names: Sequence[str], value: int) -> None:
    for name in names:
        if name in settings:
            settings[name] = value
