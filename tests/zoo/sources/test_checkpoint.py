"""A checkpoint is taken whole or refused in one sentence that names what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import ZooError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(checkpoints / "llama", tmp_path / "copy"))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    loaded = load_file(path)
    edit(loaded)
    save_file(loaded, path, {"format": "pt"})


def configure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refuses(root: Path, put: Adder, source: Path, message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        put("m", source)
    assert "\n" not in str(caught.value)
    assert Catalog(root).variants() == []
    assert not list(root.rglob("*.safetensors"))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"score.weight": torch.ones(2, 2)}), "holds 'score.weight'"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[Q].clone()}), r"layers\.4"),
        (lambda t: t.update({Q[:-6] + "bias": torch.ones(64)}), "q_proj.bias"),
        (lambda t: t.update({Q.removeprefix("model."): t[Q].clone()}), "one tensor twice"),
        (lambda t: t.pop(Q), f"lacks the tensor '{Q}'"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.2" in n], "and 8 more"),
        (lambda t: t.pop("lm_head.weight"), "lacks the tensor 'lm_head.weight'"),
        (lambda t: t.update({Q: t[Q][:32].clone()}), rf"'{Q}' .* shape \[32, 64\]"),
        (lambda t: t.update({Q: t[Q].T.contiguous()[:, :32].clone()}), "shape"),
        (lambda t: t[Q].view(-1)[5].fill_(float("nan")), f"'{Q}' .*NaN"),
        (lambda t: t[Q].view(-1)[5].fill_(float("-inf")), f"'{Q}' .*infinite"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"'{Q}' .*data type I8"),
        (lambda t: t.update({Q: t[Q].to(torch.float64)}), f"'{Q}' .*data type F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    root: Path, put: Adder, copy: Path, edit: Callable[[Tensors], object], message: str
):
    change(copy, edit)
    refuses(root, put, copy, message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_found_in_every_data_type(root: Path, put: Adder, copy: Path, dtype: torch.dtype):
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[Q].view(-1)[-1] = float("nan")

    change(copy, edit)
    refuses(root, put, copy, f"'{Q}' .*NaN")


def test_buffers_that_old_checkpoints_carry_are_kept_but_not_used(put: Adder, copy: Path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = put("plain", copy)
    change(copy, lambda tensors: tensors.update({name: torch.ones(8)}))
    variant = put("buffers", copy)
    assert variant.chain == plain.chain
    assert name in variant.tensors


def test_gpt2_masks_are_ignored(put: Adder, checkpoints: Path, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoints / "gpt2", tmp_path / "gpt2"))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    change(folder, lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask}))
    assert put("m", folder).report["changed"] == 10


def test_a_truncated_file_is_refused(root: Path, put: Adder, copy: Path):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(root, put, copy, "model.safetensors is not a sound safetensors file: .*truncated")


def test_a_huge_header_length_is_refused(root: Path, put: Adder, copy: Path):
    path = copy / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    refuses(root, put, copy, "its header claims")


def test_pickle_files_are_never_opened(root: Path, put: Adder, copy: Path):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(root, put, copy, "pytorch_model.bin, a pickle file, which can run code")
    refuses(root, put, copy / "pytorch_model.bin", "pickle file")


def test_a_folder_without_weights_is_refused(root: Path, put: Adder, copy: Path):
    (copy / "model.safetensors").unlink()
    refuses(root, put, copy, "has no model.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not a file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors cannot be read"),
        ({"weight_map": {"a": "model.safetensors"}}, "which .* denies"),
    ],
)
def test_a_wrong_index_is_refused(root: Path, put: Adder, copy: Path, index: object, message: str):
    text = index if isinstance(index, str) else json.dumps(index)
    (copy / "model.safetensors.index.json").write_text(text)
    refuses(root, put, copy, message)


def test_an_index_that_promises_too_much_is_refused(root: Path, put: Adder, copy: Path):
    names = [*load_file(copy / "model.safetensors"), "more"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(root, put, copy, "lacks 'more'")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "'t5' are not supported"),
        ({"model_type": None}, "config.json of .* is not valid"),
        ({"hidden_size": "wide"}, "config.json of .* is not valid"),
        ({"hidden_size": 63}, "config.json of .* is not valid"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"num_hidden_layers": 5}, "lacks the tensor 'model.layers.4"),
        ({"vocab_size": 321}, "config.json asks for"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    root: Path, put: Adder, copy: Path, settings: dict, message: str
):
    configure(copy, **settings)
    refuses(root, put, copy, message)


def test_a_config_that_is_no_json_is_refused(root: Path, put: Adder, copy: Path):
    (copy / "config.json").write_text("{")
    refuses(root, put, copy, "config.json of .* is not valid")


def test_a_tied_config_with_two_different_matrices_keeps_both(put: Adder, root: Path, copy: Path):
    configure(copy, tie_word_embeddings=True)
    variant = put("m", copy)
    catalog = Catalog(root)
    units = [catalog.unit(unit) for unit in catalog.chain(variant.chain).units]
    assert units[-1].tensors["head.weight"] != units[0].tensors["tokens.weight"]


def test_a_tied_config_may_have_the_head_alone(put: Adder, root: Path, copy: Path):
    configure(copy, tie_word_embeddings=True)
    change(copy, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    variant = put("m", copy)
    catalog = Catalog(root)
    units = [catalog.unit(unit) for unit in catalog.chain(variant.chain).units]
    assert units[0].tensors["tokens.weight"] == variant.tensors["lm_head.weight"]
