"""Gemma 3 (text): norms around both halves, norms on q and k, scaled embeddings, and local layers
with a window and rotary positions of their own."""

from zoo.errors import UnsupportedFamily
from zoo.families.family import Config, Design, Family, activation
from zoo.families.llama import ATTENTION, EMBED, HEAD, IGNORED, MLP, windows
from zoo.families.rope import rope
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, Norm

_REFUSED = {
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention scores",
    "use_bidirectional_attention": "attention in both directions",
}


def design(config: Config) -> Design:
    """A Gemma3TextConfig, read."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    for key, feature in _REFUSED.items():
        if getattr(config, key):
            raise UnsupportedFamily(f"Gemma 3 with {feature} ({key}) is not supported")
    hidden = config.hidden_size
    norm = Norm("rms", config.rms_norm_eps, offset=1.0)
    ropes = {kind: rope(config, Gemma3RotaryEmbedding, kind) for kind in set(config.layer_types)}

    def attention(kind: str, window: int | None) -> AttentionSpec:
        return AttentionSpec(
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm=norm,
            scale=config.query_pre_attn_scalar**-0.5,
            rope=ropes[kind],
            qk_norm=norm,
            window=window,
            post_norm=norm,
        )

    mlp = MlpSpec(
        hidden,
        config.intermediate_size,
        norm,
        activation(config.hidden_activation),
        post_norm=norm,
    )
    kinds = zip(config.layer_types, windows(config), strict=True)
    return Design(
        embed=EmbedSpec(hidden, config.vocab_size, scale=_embedding_scale(config)),
        layers=tuple((attention(kind, window), mlp) for kind, window in kinds),
        head=HeadSpec(hidden, config.vocab_size, norm),
        biased=frozenset({"q", "k", "v", "o"} if config.attention_bias else ()),
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
    )


def _embedding_scale(config: Config) -> float:
    """sqrt(hidden) in the data type of the weights, which is how the model was trained: bfloat16
    makes 55.5 of 55.4."""
    import torch

    return torch.tensor(config.hidden_size**0.5).to(config.dtype or torch.float32).item()


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    design=design,
    embed=EMBED,
    attention=ATTENTION
    | {
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "post_norm": "post_attention_layernorm",
    },
    mlp=MLP | {"norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"},
    head=HEAD,
    ignored=IGNORED,
)
