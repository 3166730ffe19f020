"""A family's two directions agree, and its specs are what transformers computes with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import builders
from tests.zoo.conftest import FAMILIES
from zoo.errors import BadCheckpoint, UnsupportedFamily
from zoo.families.family import Family, Place, activation
from zoo.families.registry import family_named, family_of
from zoo.manifest import AttentionSpec, MlpSpec, attention_of
from zoo.sources.checkpoint import read_config

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def read(folder: Path) -> tuple[Family, Any]:
    return read_config(folder, str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_places_are_each_others_inverse(checkpoints: Path, name: str):
    family, design = read(checkpoints / name)
    layers = len(design.layers)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ours = {
        family.tensor_name(Place(unit, role), layers): shape
        for unit, roles in enumerate(family.shapes(design))
        for role, shape in roles.items()
    }
    assert ours == shapes
    for key in shapes:
        place = family.tensor(key, layers)
        assert place is not None
        assert family.tensor_name(place, layers) == key
        assert family.tensor(key.removeprefix(family.prefix), layers) == place
        assert family.module(key.rpartition(".")[0], layers) == Place(
            place.unit, place.role.rpartition(".")[0]
        )


@pytest.mark.parametrize(
    "path",
    ["model.layers.4.mlp.up_proj", "model.layers.00.mlp.up_proj", "score", "encoder.block.0", ""],
)
def test_a_path_of_another_model_has_no_place(path: str):
    assert family_named("llama").module(path, num_layers=4) is None


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3, YARN])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_rotary_frequencies_equal_transformers_bit_for_bit(
    tmp_path: Path, name: str, rope: dict | None
):
    settings = {"rope_parameters": rope} if rope else {}
    folder = getattr(builders, f"tiny_{name}")(tmp_path / name, num_hidden_layers=1, **settings)
    _, design = read(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rotary = model.model.rotary_emb
    ours = design.layers[0][0].rope
    assert torch.equal(torch.tensor(ours.inverse_frequencies, dtype=torch.float32), rotary.inv_freq)
    assert ours.attention_factor == rotary.attention_scaling
    if rope is YARN:
        assert ours.attention_factor > 1


@pytest.mark.parametrize(
    ("name", "inner", "turned"), [("phi3", "model", 12), ("gpt_neox", "gpt_neox", 4)]
)
def test_partly_rotated_heads_turn_as_in_transformers(
    checkpoints: Path, name: str, inner: str, turned: int
):
    _, design = read(checkpoints / name)
    whole = AutoModelForCausalLM.from_pretrained(checkpoints / name)
    spec = attention_of(design.layers[0][0])
    ours = torch.tensor(spec.rope.inverse_frequencies, dtype=torch.float32)
    assert torch.equal(ours, getattr(whole, inner).rotary_emb.inv_freq)
    assert (2 * len(ours), spec.head_dim) == (turned, 16)


def test_gemma3_has_a_rope_and_a_window_per_type_of_layer(tmp_path: Path):
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    }
    folder = builders.tiny_gemma3(tmp_path / "gemma3", rope_parameters=rope)
    _, design = read(folder)
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    theirs = [rotary.sliding_attention_inv_freq, rotary.full_attention_inv_freq] * 2
    for (attention, _), frequencies in zip(design.layers, theirs, strict=True):
        ours = torch.tensor(attention.rope.inverse_frequencies, dtype=torch.float32)
        assert torch.equal(ours, frequencies)
    assert [layer[0].window for layer in design.layers] == [16, None, 16, None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gemma3_scales_embeddings_as_transformers_rounds_it(tmp_path: Path, dtype: str):
    folder = builders.tiny_gemma3(tmp_path / "gemma3", dtype=dtype, hidden_size=48)
    _, design = read(folder)
    embedding = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model.embed_tokens
    assert design.embed.scale == embedding.embed_scale.to(embedding.weight.dtype).item()
    assert (design.embed.scale == 6.9375) == (dtype == "bfloat16")


def test_rotary_types_that_depend_on_the_length_are_refused(tmp_path: Path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = builders.tiny_llama(tmp_path / "dynamic", rope_parameters=dynamic)
    with pytest.raises(UnsupportedFamily, match="'dynamic' depend on the length"):
        read(folder)


def test_phi3_with_long_rope_is_refused(tmp_path: Path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors}
    folder = builders.tiny_phi3(tmp_path / "long", rope_parameters=rope)
    with pytest.raises(UnsupportedFamily, match="'longrope' depend on the length"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, "one after the other"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "soft-capped attention scores"),
        ("gemma3", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_arithmetic_that_is_not_ours_is_refused(
    tmp_path: Path, name: str, setting: dict[str, Any], reason: str
):
    folder = getattr(builders, f"tiny_{name}")(tmp_path / name, **setting)
    with pytest.raises(UnsupportedFamily, match=reason):
        read(folder)


def test_the_old_name_of_gpt_neox_head_means_the_same():
    family = family_named("gpt_neox")
    assert family.tensor("embed_out.weight", 4) == family.tensor("lm_head.weight", 4)
    assert family.tensor("lm_head.weight", 4) == Place(5, "head.weight")


def test_old_configs_with_rope_scaling_are_understood(tmp_path: Path):
    folder = builders.tiny_llama(tmp_path / "old")
    path = folder / "config.json"
    text = path.read_text()
    start = text.index('"rope_parameters"')
    end = text.index("}", start) + 2
    old = '"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0},'
    path.write_text(text[:start] + old + text[end:])
    _, design = read(folder)
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    ours = torch.tensor(design.layers[0][0].rope.inverse_frequencies, dtype=torch.float32)
    assert torch.equal(ours, rotary.inv_freq)
    assert float(ours[0]) == 0.5


def test_qwen_windows_follow_use_sliding_window(tmp_path: Path):
    window = {"sliding_window": 16, "max_window_layers": 2}
    _, without = read(builders.tiny_qwen2(tmp_path / "off", use_sliding_window=False, **window))
    _, with_ = read(builders.tiny_qwen2(tmp_path / "on", use_sliding_window=True, **window))
    assert [layer[0].window for layer in without.layers] == [None] * 4
    assert [layer[0].window for layer in with_.layers] == [None, None, 16, 16]


def test_llama_biases_follow_the_config(tmp_path: Path):
    folder = builders.tiny_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    family, design = read(folder)
    shapes = family.shapes(design)
    assert {"q.bias", "k.bias", "v.bias", "o.bias"} <= shapes[1].keys()
    assert {"gate.bias", "up.bias", "down.bias"} <= shapes[2].keys()
    assert "norm.bias" not in shapes[1]


def test_gpt2_scales_by_layer_where_asked(tmp_path: Path):
    folder = builders.tiny_gpt2(tmp_path / "scaled", scale_attn_by_inverse_layer_idx=True)
    _, design = read(folder)
    assert [layer[0].scale for layer in design.layers] == [0.25 / n for n in (1.0, 2.0, 3.0, 4.0)]
    attention, mlp = design.layers[0]
    assert isinstance(attention, AttentionSpec)
    assert isinstance(mlp, MlpSpec)
    assert (attention.fused, attention.transposed, attention.rope) == (True, True, None)
    assert (mlp.activation, mlp.gated, design.positions) == ("gelu_tanh", False, 256)


def test_gpt2_with_cross_attention_is_refused(tmp_path: Path):
    folder = builders.tiny_gpt2(tmp_path / "cross", add_cross_attention=True)
    with pytest.raises(UnsupportedFamily, match="cross attention"):
        read(folder)


def test_unknown_types_and_activations_are_refused_with_the_known_ones():
    with pytest.raises(UnsupportedFamily, match=r"'t6' are not supported: the transformers"):
        family_of("t6")
    with pytest.raises(UnsupportedFamily, match="'relu2' is not supported"):
        activation("relu2")
    with pytest.raises(UnsupportedFamily):
        family_named("nobody")


def test_a_depth_that_cannot_be_is_refused_before_anything_is_built(tmp_path: Path):
    config = AutoConfig.for_model("llama", num_hidden_layers=10**9)
    config.save_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match="'num_hidden_layers': 1000000000"):
        read(tmp_path)
