"""GPT-NeoX and Pythia: attention and MLP side by side, layer norms with bias, q/k/v fused per head,
partly rotated heads."""

from zoo.errors import UnsupportedFamily
from zoo.families.family import Config, Design, Family, activation
from zoo.families.rope import rope
from zoo.manifest import AttentionSpec, EmbedSpec, HeadSpec, MlpSpec, Norm, ParallelSpec


def design(config: Config) -> Design:
    """A GPTNeoXConfig, read."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    if not config.use_parallel_residual:
        raise UnsupportedFamily(
            "GPT-NeoX with use_parallel_residual false is not supported: its layers run attention "
            "and MLP one after the other"
        )
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = hidden // heads
    norm = Norm("layer", config.layer_norm_eps)
    attention = AttentionSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        norm=norm,
        scale=head_dim**-0.5,
        rope=rope(config, GPTNeoXRotaryEmbedding),
        fused=True,
        grouped=True,
    )
    mlp = MlpSpec(
        hidden, config.intermediate_size, norm, activation(config.hidden_act), gated=False
    )
    by_choice = {"qkv", "o"} if config.attention_bias else set[str]()
    return Design(
        embed=EmbedSpec(hidden, config.vocab_size),
        layers=((ParallelSpec(attention, mlp),),) * config.num_hidden_layers,
        head=HeadSpec(hidden, config.vocab_size, norm),
        biased=frozenset({"norm", "mlp_norm", "up", "down"} | by_choice),
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
    )


GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    design=design,
    prefix="gpt_neox.",
    embed={"tokens": "embed_in"},
    attention={
        "norm": "input_layernorm",
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
    },
    mlp={
        "mlp_norm": "post_attention_layernorm",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    head={"norm": "final_layer_norm", "head": "lm_head"},
    aliases={"embed_out": "lm_head"},
    parallel=True,
    ignored=(
        "layers.*.attention.bias",
        "layers.*.attention.masked_bias",
        "layers.*.attention.rotary_emb.inv_freq",
    ),
)
