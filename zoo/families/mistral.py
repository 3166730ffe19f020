"""Mistral: Llama with a sliding window on every layer, where the config has one."""

from zoo.families.family import Config, Design, Family
from zoo.families.llama import ATTENTION, EMBED, HEAD, IGNORED, MLP, Traits, llama_like


def design(config: Config) -> Design:
    """A MistralConfig, read."""
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    windows = (config.sliding_window,) * config.num_hidden_layers
    return llama_like(config, Traits(MistralRotaryEmbedding, frozenset(), windows=windows))


MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    design=design,
    embed=EMBED,
    attention=ATTENTION,
    mlp=MLP,
    head=HEAD,
    ignored=IGNORED,
)
