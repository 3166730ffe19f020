"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows where the config asks."""

from zoo.families.family import Config, Design, Family
from zoo.families.llama import ATTENTION, EMBED, HEAD, IGNORED, MLP, Traits, llama_like, windows


def design(config: Config) -> Design:
    """A Qwen2Config, read; `use_sliding_window` has already decided about `layer_types`."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    return llama_like(
        config,
        Traits(Qwen2RotaryEmbedding, frozenset({"q", "k", "v"}), windows=windows(config)),
    )


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    design=design,
    embed=EMBED,
    attention=ATTENTION,
    mlp=MLP,
    head=HEAD,
    ignored=IGNORED,
)
