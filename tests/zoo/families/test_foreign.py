"""Families that run through transformers' own layers: their tables are the model's, their numbers
are measured, and what cannot be served alike is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import UnsupportedFamily
from zoo.export import export
from zoo.families.family import Design, Place
from zoo.families.registry import family_named, is_native
from zoo.manifest import ForeignSpec, Norm
from zoo.progress import Quiet
from zoo.sources.checkpoint import read_config

KINDS = ("olmo2", "falcon", "falcon_new", "falcon_old", "stablelm", "stablelm_parallel")
GEMMA = {"head_dim": 16, "hidden_size": 48, "num_key_value_heads": 2}


def read(folder: Path) -> Design:
    return read_config(folder, str(folder))[1]


def layers_of(design: Design) -> list[ForeignSpec]:
    return [spec for (spec,) in design.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_places_are_each_others_inverse(tmp_path: Path, kind: str):
    folder = getattr(builders, f"tiny_{kind}")(tmp_path / kind)
    family, design = read_config(folder, kind)
    assert not is_native(family.name)
    assert family_named(family.name) == family
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = {
        family.tensor_name(Place(unit, role), 4): shape
        for unit, roles in enumerate(family.shapes(design))
        for role, shape in roles.items()
    }
    assert ours == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in ours:
        place = family.tensor(name, 4)
        assert place is not None
        assert family.tensor_name(place, 4) == name
        role = place.role.rpartition(".")[0]
        assert family.module(name.rpartition(".")[0], 4) == Place(place.unit, role)
    assert family.tensor(f"{family.prefix}{family.layer}4.mlp.up.weight", 4) is None
    linears = [
        name.rpartition(f"{family.layer}0.")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{family.layer}0." in name
    ]
    assert list(layers_of(design)[0].linears) == linears


@pytest.mark.parametrize("kind", ["olmo2", "falcon_new", "stablelm_parallel"])
def test_export_gives_back_every_tensor_bit_for_bit(
    put: Adder, root: Path, tmp_path: Path, kind: str
):
    source = getattr(builders, f"tiny_{kind}")(tmp_path / kind)
    put("base", source)
    out = export(root, "base", tmp_path / "out", Quiet())
    theirs = load_file(source / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == kind.partition("_")[0]


def test_what_a_config_says_of_tokens_keeps_no_layers_apart(put: Adder, root: Path, tmp_path: Path):
    base = builders.tiny_olmo2(tmp_path / "base")
    put("base", base)
    tuned = builders.fine_tune(tmp_path / "tuned", base, ["layers.3."])
    settings = json.loads((tuned / "config.json").read_text())
    changed = {"eos_token_id": 7, "attention_dropout": 0.1, "initializer_range": 0.5}
    (tuned / "config.json").write_text(json.dumps(settings | changed))
    assert put("tuned", tuned, base="base").report == {"shared": 5, "changed": 1, "attached": 0}
    settings["rms_norm_eps"] = 1e-3
    (tuned / "config.json").write_text(json.dumps(settings))
    assert put("other", tuned, base="base").report["shared"] == 1


def test_heads_that_a_layer_repeats_are_kept_once(tmp_path: Path):
    spec = layers_of(read(builders.tiny_falcon_new(tmp_path / "new")))[0]
    assert (spec.heads, spec.kv_heads, spec.copies, spec.head_dim) == (4, 2, 2, 16)
    spec = layers_of(read(builders.tiny_falcon(tmp_path / "multi_query")))[0]
    assert (spec.heads, spec.kv_heads, spec.copies) == (4, 1, 1)


def test_windows_are_read_off_the_masks(tmp_path: Path):
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = builders.tiny_model(
        tmp_path / "cohere2", "cohere2", sliding_window=16, layer_types=types
    )
    assert [spec.window for spec in layers_of(read(folder))] == [16, 16, None, 16]


@pytest.mark.parametrize(
    ("kind", "settings", "scale", "offset", "norm", "logits"),
    [
        (
            "granite",
            {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "rms_norm_eps": 1e-4},
            12.0,
            0,
            Norm("rms", 1e-4),
            0.125,
        ),
        ("cohere", {"logit_scale": 0.0625}, 1.0, 0, Norm("layer", 1e-5), 0.0625),
        ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 64}, 1.0, 2, Norm("layer", 1e-5), 1.0),
        ("gemma", GEMMA, 48**0.5, 0, Norm("rms", 1e-6, 1.0), 1.0),
        ("gemma", GEMMA | {"dtype": "bfloat16"}, 6.9375, 0, Norm("rms", 1e-6, 1.0), 1.0),
    ],
)
def test_both_ends_of_a_chain_are_measured(
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    scale: float,
    offset: int,
    norm: Norm,
    logits: float,
):
    design = read(builders.tiny_model(tmp_path / kind, kind, **settings))
    assert design.embed.scale == pytest.approx(scale, rel=1e-7)
    assert (design.embed.position_offset, design.head.norm) == (offset, norm)
    assert design.head.scale == logits


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gemma2", {"head_dim": 16}, "soft-capped attention scores"),
        (
            "gemma2",
            {"head_dim": 16, "attn_logit_softcapping": None},
            r"more after their last layer .*\(soft-capped logits",
        ),
        ("falcon", {"alibi": True}, "a mask of their own, such as ALiBi"),
        ("mixtral", {"num_local_experts": 2}, "as experts and convolutions are kept"),
        ("gptj", {}, "their attention is written out within their layers"),
        ("nanochat", {}, "more before their first layer"),
        ("minicpm3", {}, "keys and values of different widths"),
        ("diffllama", {}, "attend 8 times in 4 layers"),
        ("bert", {"is_decoder": True}, "more around their layers"),
        ("bart", {}, "an encoder beside their decoder"),
        ("olmo2", {"hidden_size": 1 << 24}, "cannot be as wide as this config says"),
        ("olmo2", {"max_position_embeddings": 1 << 30}, "no sensible longest sequence"),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic', which depend on the length of the sequence",
        ),
    ],
)
def test_what_cannot_be_served_alike_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], reason: str
):
    folder = builders.tiny_config(tmp_path / kind, kind, **settings)
    with pytest.raises(UnsupportedFamily, match=reason):
        read(folder)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path):
    folder = builders.tiny_olmo2(tmp_path / "custom")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedFamily, match="code that comes with a model is never run"):
        read(folder)


def test_the_catalog_says_which_layers_are_transformers(put: Adder, root: Path, tmp_path: Path):
    variant = put("base", builders.tiny_stablelm(tmp_path / "base"))
    catalog = Catalog(root)
    units = [catalog.unit(unit) for unit in catalog.chain(variant.chain).units]
    foreign = [unit.spec for unit in units if isinstance(unit.spec, ForeignSpec)]
    assert [spec.layer for spec in foreign] == [0, 1, 2, 3]
    assert json.loads(foreign[0].config)["model_type"] == variant.family == "stablelm"


def test_norms_with_biases_are_tuned_as_units_of_their_own(put: Adder, tmp_path: Path):
    base = builders.tiny_falcon(tmp_path / "base")
    put("base", base)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "ln_tuning" in name:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "norms")
    variant = put("norms", tmp_path / "norms", base="base")
    assert variant.report["changed"] == model.config.num_hidden_layers
    assert variant.golden is not None
    assert variant.golden < 1e-4
