"""Llama 1-3 and what shares its architecture (SmolLM2, Vicuna, TinyLlama, ...).

Also the pattern of the families that follow it: Qwen2, Qwen3, Mistral and Phi-3 differ in few
places and say only those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.families.family import Config, Design, Family, activation
from zoo.families.rope import rope
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, Norm

EMBED = {"tokens": "embed_tokens"}
ATTENTION = {
    "norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
MLP = {
    "norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
HEAD = {"norm": "norm", "head": "lm_head"}
IGNORED = ("layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Traits:
    """Where a Llama-like architecture differs from Llama. `windows`: one per layer, or none.
    `fused`: q, k and v are one linear layer, gate and up another."""

    rotary: type
    biased: frozenset[str]
    qk_norm: bool = False
    windows: Sequence[int | None] | None = None
    fused: bool = False


def llama_like(config: Config, traits: Traits) -> Design:
    """The design of an architecture with RMS norms, rotary positions and a gated MLP."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    norm = Norm("rms", config.rms_norm_eps)
    positions = rope(config, traits.rotary)
    mlp = MlpSpec(
        hidden, config.intermediate_size, norm, activation(config.hidden_act), fused=traits.fused
    )
    windows = traits.windows or (None,) * config.num_hidden_layers

    def attention(window: int | None) -> AttentionSpec:
        return AttentionSpec(
            hidden=hidden,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            norm=norm,
            scale=head_dim**-0.5,
            rope=positions,
            qk_norm=norm if traits.qk_norm else None,
            fused=traits.fused,
            window=window,
        )

    return Design(
        embed=EmbedSpec(hidden, config.vocab_size),
        layers=tuple((attention(window), mlp) for window in windows),
        head=HeadSpec(hidden, config.vocab_size, norm),
        biased=traits.biased,
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
    )


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, where `layer_types` asks for one."""
    return [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]


def design(config: Config) -> Design:
    """A LlamaConfig, read."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    attention = {"q", "k", "v", "o"} if config.attention_bias else set[str]()
    mlp = {"gate", "up", "down"} if config.mlp_bias else set[str]()
    return llama_like(config, Traits(LlamaRotaryEmbedding, frozenset(attention | mlp)))


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    design=design,
    embed=EMBED,
    attention=ATTENTION,
    mlp=MLP,
    head=HEAD,
    ignored=IGNORED,
)
