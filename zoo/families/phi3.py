"""Phi-3: Llama with fused q/k/v and gate/up, partly rotated heads and a sliding window where the
config asks."""

from zoo.families.family import Config, Design, Family
from zoo.families.llama import EMBED, HEAD, IGNORED, Traits, llama_like


def design(config: Config) -> Design:
    """A Phi3Config, read."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    windows = (config.sliding_window,) * config.num_hidden_layers
    return llama_like(config, Traits(Phi3RotaryEmbedding, frozenset(), windows=windows, fused=True))


PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    design=design,
    embed=EMBED,
    attention={
        "norm": "input_layernorm",
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
    },
    mlp={
        "norm": "post_attention_layernorm",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    head=HEAD,
    ignored=IGNORED,
)
