"""Rotary positions of a config, settled at import.

transformers' own rotary class computes the inverse frequencies and the attention factor, so ours
equal its float32 values bit for bit whatever the scaling rule. Rules whose frequencies depend on
the length of the sequence cannot be settled at import and are refused.
"""

from zoo.errors import UnsupportedFamily
from zoo.families.family import Config
from zoo.manifest import Rope

_SETTLED = ("default", "linear", "llama3", "yarn")


def rope(config: Config, rotary: type, layer_type: str | None = None) -> Rope:
    """What `rotary`, a RotaryEmbedding class of transformers, makes of a config; for layers of one
    type, where each has its own."""
    parameters = config.rope_parameters
    kind = (parameters if layer_type is None else parameters[layer_type])["rope_type"]
    if kind not in _SETTLED:
        raise UnsupportedFamily(
            f"rotary positions of type {kind!r} depend on the length of the sequence and are not "
            f"supported: supported are {', '.join(_SETTLED)}"
        )
    embedding = rotary(config)
    prefix = "" if layer_type is None else f"{layer_type}_"
    return Rope(
        inverse_frequencies=tuple(getattr(embedding, f"{prefix}inv_freq").double().tolist()),
        attention_factor=float(getattr(embedding, f"{prefix}attention_scaling")),
    )
