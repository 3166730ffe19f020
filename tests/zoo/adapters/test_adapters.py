"""An adapter means what peft makes of it and comes back bit-equal, or it is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import builders
from tests.zoo.adding.test_add import assert_same_tensors
from tests.zoo.conftest import FAMILIES, Adder
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.export import export
from zoo.families.family import Place
from zoo.families.registry import family_named
from zoo.manifest import LowRank, NormWeights, ObjectDigest
from zoo.progress import Quiet
from zoo.store import Store

Tensors = dict[str, torch.Tensor]
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read(store: Store, digest: ObjectDigest) -> torch.Tensor:
    stored = store.tensor(digest)
    if stored.dtype == "BF16":
        wide = np.frombuffer(stored.data, "<u2").astype(np.uint32) << 16
        return torch.from_numpy(wide.view(np.float32).reshape(stored.shape))
    kind = {"F32": "<f4", "F16": "<f2"}[stored.dtype]
    array = np.frombuffer(stored.data, kind).astype(np.float32)
    return torch.from_numpy(array.reshape(stored.shape))


def our_weights(root: Path, name: str) -> Tensors:
    """The variant's effective weights by checkpoint name: stored tensor + scale * B A."""
    catalog, store = Catalog(root), Store(root)
    variant = catalog.variant(name)
    family = family_named(variant.family)
    chain = catalog.chain(variant.chain)
    layers = family.num_layers(len(chain.units))
    weights: Tensors = {}
    for index, (unit_digest, attachment) in enumerate(
        zip(chain.units, chain.attachments, strict=True)
    ):
        unit = catalog.unit(unit_digest)
        for role, digest in unit.tensors.items():
            weights[family.tensor_name(Place(index, role), layers)] = read(store, digest)
        for piece in catalog.attachment(attachment).pieces if attachment else ():
            if isinstance(piece, NormWeights):
                key = family.tensor_name(Place(index, f"{piece.role}.weight"), layers)
                weights[key] = read(store, piece.weight)
                continue
            assert isinstance(piece, LowRank)
            delta = piece.scale * (read(store, piece.b) @ read(store, piece.a))
            key = family.tensor_name(Place(index, f"{piece.role}.weight"), layers)
            weights[key] = weights[key] + (delta.T if variant.family == "gpt2" else delta)
    return weights


def peft_weights(base: Path, adapter: Path) -> Tensors:
    """The same from peft itself: its merged model."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        return model.merge_and_unload().state_dict()


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every target": {"targets": EVERY, "rank": 3, "alpha": 5},
    "rank-stabilized": {"use_rslora": True, "rank": 6},
    "patterns": {
        "targets": EVERY,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
        "alpha_pattern": {"^model.layers.2.mlp.down_proj": 1, r"[02]\.self_attn\.v_proj": 32},
    },
    "some layers": {"layers_to_transform": [1, 3], "targets": ["q_proj", "down_proj"]},
    "regular expression": {"targets": r".*layers\.[01]\.mlp\.(up|gate)_proj"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole norm": {"modules_to_save": ["post_attention_layernorm"]},
    "one layer": {"layers_to_transform": 2, "targets": EVERY},
}


@pytest.mark.parametrize("kind", LORAS)
def test_it_means_what_peft_makes_of_it(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path, kind: str
):
    llama = checkpoints / "llama"
    put("base", llama)
    source = builders.tiny_lora(tmp_path / "adapter", llama, **LORAS[kind])
    variant = put("tuned", source)
    assert (variant.kind, variant.base) == ("lora", "base")
    ours, theirs = our_weights(root, "tuned"), peft_weights(llama, source)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name].float(), rtol=1e-5, atol=1e-6)
    out = export(root, "tuned", tmp_path / "out", Quiet())
    assert_same_tensors(source, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    assert "tokenizer.json" in variant.files, "it is served with its base's tokenizer"


FUSED = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize("family", [*FAMILIES[1:], "tied"])
def test_it_means_what_peft_makes_of_it_in_every_family(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path, family: str
):
    base = checkpoints / family
    put("base", base)
    source = builders.tiny_lora(
        tmp_path / "adapter",
        base,
        targets=FUSED.get(family, EVERY),
        fan_in_fan_out=family == "gpt2",
        seed=3,
    )
    variant = put("tuned", source)
    units = 4 if family == "gpt_neox" else 8
    assert variant.report == {"shared": units + 2, "changed": 0, "attached": units}
    theirs = peft_weights(base, source)
    for name, weight in our_weights(root, "tuned").items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_whole_modules_become_units_of_its_own(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path
):
    put("base", checkpoints / "tied")
    source = builders.tiny_lora(
        tmp_path / "adapter", checkpoints / "tied", modules_to_save=["lm_head"]
    )
    variant = put("tuned", source)
    assert variant.report == {"shared": 9, "changed": 1, "attached": 4}


def test_added_tokens_widen_embedding_and_head(put: Adder, tmp_path: Path, checkpoints: Path):
    put("base", checkpoints / "llama")
    source = builders.tiny_lora(
        tmp_path / "a", checkpoints / "llama", modules_to_save=["embed_tokens", "lm_head"]
    )

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if "lora" not in name]:
            tensors[name] = torch.cat([tensors[name], tensors[name][:4]])

    change(source, widen)
    assert put("tuned", source).vocabulary == builders.VOCABULARY + 4
    change(source, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ZooError, match="embedding of 324 tokens and a head of 320"):
        put("torn", source)


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    path = folder / "adapter_model.safetensors"
    loaded = load_file(path)
    edit(loaded)
    save_file(loaded, path, {"format": "pt"})


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def refuses(root: Path, put: Adder, source: Path, message: str, **options: object) -> None:
    before = set(Store(root).digests())
    with pytest.raises(ZooError, match=message) as caught:
        put("tuned", source, **options)
    assert "\n" not in str(caught.value)
    assert "tuned" not in {variant.name for variant in Catalog(root).variants()}
    assert set(Store(root).digests()) == before


LAYER = "base_model.model.model.layers.0.self_attn."
A, B = f"{LAYER}q_proj.lora_A.weight", f"{LAYER}q_proj.lora_B.weight"


def silence(tensors: Tensors) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (silence, "changes nothing"),
        (lambda t: t.clear(), "changes nothing"),
        (lambda t: t.pop(A), "lora_B.weight' without its other half"),
        (lambda t: t.update({A: t[A][:2].clone()}), r"shape \[2, 64\], .* \[4, 64\] at rank 4"),
        (lambda t: t.update({A: torch.ones(4, 48)}), "made for another base"),
        (lambda t: t.update({B: t[B].to(torch.int32)}), "data type I32"),
        (lambda t: t[B].fill_(float("nan")), "q_proj.lora_B.weight' .*NaN"),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}),
            "'score.weight'",
        ),
        (lambda t: t.update({A.replace("s.0.", "s.9."): t[A].clone()}), "without its other half"),
        (
            lambda t: t.update({n.replace("s.0.", "s.9."): t[n].clone() for n in (A, B)}),
            r"layers\.9\.self_attn\.q_proj'.* of 4 layers",
        ),
        (
            lambda t: t.update({n.replace("q_proj", "wq"): t[n].clone() for n in (A, B)}),
            "changes 'model.layers.0.self_attn.wq'",
        ),
        (
            lambda t: t.update({LAYER + "q_proj.lora_C.weight": torch.ones(64)}),
            "lora_C.weight', which no LoRA of peft has",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            r"norm.weight' .* shape \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    root: Path,
    put: Adder,
    checkpoints: Path,
    copy: Path,
    edit: Callable[[Tensors], object],
    message: str,
):
    put("base", checkpoints / "llama")
    change(copy, edit)
    refuses(root, put, copy, message, base="base")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "XLORA"}, "type XLORA, which mixes its experts"),
        ({"peft_type": "POLY"}, "type POLY"),
        ({"peft_type": "NEWEST"}, "peft cannot load .*NEWEST"),
        ({"peft_type": "VERA"}, "peft cannot load"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "only CAUSAL_LM"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer replication"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"r": "many"}, "adapter_config.json of .* is not valid"),
        ({"r": 0}, "must be at least 1"),
        ({"rank_pattern": {"(": 3}}, "pattern .* is not valid"),
        ({"peft_type": None}, "is not valid"),
    ],
)
def test_settings_that_would_be_computed_wrongly_are_refused(
    root: Path, put: Adder, checkpoints: Path, copy: Path, settings: dict, message: str
):
    put("base", checkpoints / "llama")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    refuses(root, put, copy, message, base="base")


@pytest.mark.parametrize("other", ["qwen3", "gpt2"])
def test_an_adapter_for_another_base_is_refused(
    root: Path, put: Adder, checkpoints: Path, adapter: Path, other: str
):
    put("base", checkpoints / other)
    refuses(root, put, adapter, "another base", base="base")


def test_an_adapter_in_a_pickle_file_is_refused(
    root: Path, put: Adder, checkpoints: Path, copy: Path
):
    put("base", checkpoints / "llama")
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    refuses(root, put, copy, "pickle file", base="base")


def test_the_base_is_found_by_path_or_name_or_must_be_told(
    root: Path, put: Adder, checkpoints: Path, copy: Path
):
    refuses(root, put, copy, "which is not in the zoo: give --base NAME")
    put("other", checkpoints / "qwen2")
    put("mine", checkpoints / "llama")
    assert put("by-path", copy).base == "mine"
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "mine"}))
    assert put("by-name", copy).base == "mine"
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refuses(root, put, copy, "names no base: give --base NAME")
    refuses(root, put, copy, "'by-name' stands itself upon 'mine'", base="by-name")


def test_an_adapter_outlives_its_bases_name(
    root: Path, put: Adder, checkpoints: Path, adapter: Path
):
    put("base", checkpoints / "llama")
    variant = put("tuned", adapter)
    put("base", checkpoints / "qwen2", replace=True)
    assert Catalog(root).variant("tuned") == variant
    assert len(our_weights(root, "tuned")) == 39


def test_an_adapter_with_a_tokenizer_of_its_own_does_not_mix_it(
    put: Adder, checkpoints: Path, copy: Path
):
    put("base", checkpoints / "llama")
    own = json.loads((checkpoints / "llama" / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(own))
    variant = put("tuned", copy)
    assert set(variant.borrowed) == {"config.json", "generation_config.json"}
    assert "chat_template.jinja" not in variant.files
