"""GPT-2: learned positions, layer norms with bias, fused q/k/v, matrices that lie as [in, out]."""

from zoo.errors import UnsupportedFamily
from zoo.families.family import Config, Design, Family, activation
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, Norm

_BIASED = frozenset({"norm", "qkv", "o", "up", "down"})


def design(config: Config) -> Design:
    """A GPT2Config, read."""
    if config.add_cross_attention:
        raise UnsupportedFamily("GPT-2 with cross attention is not supported: it needs an encoder")
    hidden, heads = config.n_embd, config.n_head
    if hidden % heads:
        raise UnsupportedFamily(f"a GPT-2 of width {hidden} cannot have {heads} heads")
    norm = Norm("layer", config.layer_norm_epsilon)
    head_dim = hidden // heads
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0

    def attention(layer: int) -> AttentionSpec:
        by_layer = float(layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        return AttentionSpec(
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            norm=norm,
            scale=scale / by_layer,
            fused=True,
            transposed=True,
        )

    mlp = MlpSpec(
        hidden=hidden,
        intermediate=config.n_inner or 4 * hidden,
        norm=norm,
        activation=activation(config.activation_function),
        gated=False,
        transposed=True,
    )
    return Design(
        embed=EmbedSpec(hidden, config.vocab_size),
        layers=tuple((attention(layer), mlp) for layer in range(config.n_layer)),
        head=HeadSpec(hidden, config.vocab_size, norm),
        biased=_BIASED,
        tied=config.tie_word_embeddings,
        context=config.n_positions,
        positions=config.n_positions,
    )


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    design=design,
    prefix="transformer.",
    layer="h.",
    embed={"tokens": "wte", "positions": "wpe"},
    attention={"norm": "ln_1", "qkv": "attn.c_attn", "o": "attn.c_proj"},
    mlp={"norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    head={"norm": "ln_f", "head": "lm_head"},
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
)
