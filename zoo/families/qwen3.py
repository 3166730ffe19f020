"""Qwen3 (dense): Llama with norms on q and k per head, and heads of their own width."""

from zoo.families.family import Config, Design, Family
from zoo.families.llama import ATTENTION, EMBED, HEAD, IGNORED, MLP, Traits, llama_like, windows


def design(config: Config) -> Design:
    """A Qwen3Config, read; `use_sliding_window` has already decided about `layer_types`."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    biased = frozenset({"q", "k", "v", "o"} if config.attention_bias else ())
    return llama_like(
        config, Traits(Qwen3RotaryEmbedding, biased, qk_norm=True, windows=windows(config))
    )


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    design=design,
    embed=EMBED,
    attention=ATTENTION | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    mlp=MLP,
    head=HEAD,
    ignored=IGNORED,
)
