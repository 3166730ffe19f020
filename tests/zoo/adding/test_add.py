"""What is added comes back bit-equal, shares what it can, and takes the name it was given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import builders
from tests.zoo.conftest import FAMILIES, Adder
from zoo.catalog import Catalog
from zoo.errors import (
    BadCheckpoint,
    BadName,
    BadSource,
    NameTaken,
    UnknownVariant,
    UnsupportedOption,
)
from zoo.export import export
from zoo.keeping.listing import Listing
from zoo.keeping.verify import verify
from zoo.progress import Quiet
from zoo.store import Store


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    found: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 it is no mapping
                tensor = file.get_tensor(name)
                found[name] = (tensor.dtype, tensor.view(torch.uint8))
    return found


def assert_same_tensors(left: Path, right: Path) -> None:
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for name, (dtype, data) in ours.items():
        assert dtype == theirs[name][0], name
        assert torch.equal(data, theirs[name][1]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_equal(
    root: Path, tmp_path: Path, put: Adder, family: str, dtype: str
):
    source = getattr(builders, f"tiny_{family}")(tmp_path / "source", dtype=dtype)
    variant = put("m", source)
    assert (variant.kind, variant.family, variant.dtype) == ("base", family, dtype)
    assert (variant.hidden, variant.vocabulary, variant.context) == (64, 320, 256)
    assert variant.eos == (2,)
    out = export(root, "m", tmp_path / "out", Quiet())
    assert_same_tensors(source, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes()
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(tensor, ours[name])
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_tied_head_points_to_the_embedding(root: Path, put: Adder, checkpoints: Path):
    variant = put("m", checkpoints / "tied")
    catalog = Catalog(root)
    units = [catalog.unit(unit) for unit in catalog.chain(variant.chain).units]
    assert units[-1].tensors["head.weight"] == units[0].tensors["tokens.weight"]
    assert "lm_head.weight" not in variant.tensors


def test_shards_are_read_as_one(root: Path, tmp_path: Path, put: Adder, checkpoints: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, sharded = put("whole", checkpoints / "llama"), put("sharded", tmp_path / "shards")
    assert whole.chain == sharded.chain
    assert_same_tensors(tmp_path / "shards", export(root, "sharded", tmp_path / "out", Quiet()))


def test_names_without_the_prefix_mean_the_same(put: Adder, tmp_path: Path, checkpoints: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "gpt2")
    model.transformer.save_pretrained(tmp_path / "bare")
    first, second = put("full", checkpoints / "gpt2"), put("bare", tmp_path / "bare")
    assert first.chain == second.chain
    assert "h.0.ln_1.weight" in second.tensors


def test_units_are_shared_by_content(root: Path, put: Adder, tmp_path: Path, checkpoints: Path):
    llama = checkpoints / "llama"
    put("base", llama)
    last = put("last", builders.fine_tune(tmp_path / "last", llama, ["layers.3."]))
    every = put("every", builders.fine_tune(tmp_path / "every", llama, [""]))
    told = put("told", builders.fine_tune(tmp_path / "told", llama, [""], seed=5), base="base")
    assert (last.kind, last.base) == ("partial", "base")
    assert last.report == {"shared": 8, "changed": 2, "attached": 0}
    assert (every.kind, every.base) == ("base", None)
    assert (told.kind, told.base) == ("full", "base")
    assert told.report["changed"] == 10
    blocks = {tuple(row.variants): (row.first, row.last) for row in Listing(root).blocks()}
    assert blocks[("base", "last")] in {(0, 7), (9, 10)}
    assert blocks[("every",)] == (0, 10)


def test_one_changed_norm_costs_one_small_tensor(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path
):
    put("base", checkpoints / "llama")
    before = len(list(Store(root).digests()))
    tuned = builders.fine_tune(tmp_path / "t", checkpoints / "llama", ["2.input_layernorm"])
    variant = put("norm", tuned)
    assert variant.kind == "norm"
    assert variant.report == {"shared": 10, "changed": 0, "attached": 1}
    files = {path.name for path in tuned.iterdir()} - {"model.safetensors"}
    added = len(list(Store(root).digests())) - before
    assert added <= 1 + len(files)


def test_a_bias_only_tune_shares_every_unit(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path
):
    put("base", checkpoints / "gpt2")
    tuned = builders.fine_tune(tmp_path / "t", checkpoints / "gpt2", [".bias"])
    variant = put("bias", tuned)
    assert variant.kind == "bias"
    assert variant.report == {"shared": 10, "changed": 0, "attached": 9}
    assert variant.golden is not None
    assert_same_tensors(tuned, export(root, "bias", tmp_path / "out", Quiet()))


def test_the_same_model_twice_is_stored_once(root: Path, put: Adder, checkpoints: Path):
    put("one", checkpoints / "qwen2")
    before = Store(root).disk_bytes()
    two = put("two", checkpoints / "qwen2")
    assert Store(root).disk_bytes() == before
    assert (two.kind, two.report["changed"]) == ("partial", 0)


def test_a_base_that_is_added_again_stands_upon_none_of_its_fine_tunes(
    put: Adder, checkpoints: Path, tmp_path: Path
):
    put("base", checkpoints / "llama")
    put("last", builders.fine_tune(tmp_path / "last", checkpoints / "llama", ["layers.3."]))
    again = put("base", checkpoints / "llama", replace=True)
    assert (again.kind, again.base) == ("base", None)


def test_a_taken_name_needs_replace(root: Path, put: Adder, checkpoints: Path):
    first = put("m", checkpoints / "llama")
    with pytest.raises(NameTaken, match="--replace"):
        put("m", checkpoints / "qwen2")
    second = put("m", checkpoints / "qwen2", replace=True)
    assert Catalog(root).variant("m").chain == second.chain != first.chain


@pytest.mark.parametrize("name", ["", " a", "-a", "a b", "ä", "a" * 129, "../a"])
def test_a_name_must_look_like_one(put: Adder, checkpoints: Path, name: str):
    with pytest.raises(BadName, match="letters, digits"):
        put(name, checkpoints / "llama")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "what"}, "exact, delta or equivalent"),
        ({"min_agreement": 0.9}, "only valid with"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
    ],
)
def test_options_that_are_not_there_are_refused(
    root: Path, put: Adder, checkpoints: Path, options: dict, message: str
):
    with pytest.raises(UnsupportedOption, match=message):
        put("m", checkpoints / "llama", **options)
    assert not root.exists()


def test_an_unknown_base_is_refused(root: Path, put: Adder, checkpoints: Path):
    with pytest.raises(UnknownVariant, match="nobody"):
        put("m", checkpoints / "llama", base="nobody")


def test_a_base_of_another_shape_is_refused(
    root: Path, put: Adder, tmp_path: Path, checkpoints: Path
):
    put("base", checkpoints / "llama")
    before = set(Store(root).digests())
    deeper = builders.tiny_llama(tmp_path / "deeper", num_hidden_layers=5)
    with pytest.raises(BadCheckpoint, match="depth or width"):
        put("m", deeper, base="base")
    assert set(Store(root).digests()) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [("nothing/at/all", "neither a folder"), ("no such thing", "neither a folder")],
)
def test_a_source_that_is_not_there_is_named(put: Adder, source: str, message: str):
    with pytest.raises(BadSource, match=message):
        put("m", source)


def test_a_hub_id_without_a_network_says_so(put: Adder):
    with pytest.raises(BadSource, match="hub cannot be reached"):
        put("m", "nobody/nothing")


def test_a_folder_of_nothing_is_refused(put: Adder, tmp_path: Path):
    with pytest.raises(BadSource, match=r"neither a config\.json"):
        put("m", tmp_path)


def test_export_does_not_overwrite(root: Path, tmp_path: Path, put: Adder, checkpoints: Path):
    put("m", checkpoints / "llama")
    (tmp_path / "out").mkdir()
    export(root, "m", tmp_path / "out", Quiet())
    with pytest.raises(BadSource, match="not empty"):
        export(root, "m", tmp_path / "out", Quiet())
    assert not list(tmp_path.glob(".out-*"))


def test_a_fresh_zoo_verifies(root: Path, put: Adder, checkpoints: Path):
    for family in FAMILIES:
        put(family, checkpoints / family)
    verdict = verify(root, Quiet())
    assert verdict.damages == []
    assert verdict.checked == len(list(Store(root).digests()))


def test_end_tokens_come_from_the_generation_config(put: Adder, tmp_path: Path):
    source = builders.tiny_llama(tmp_path / "m")
    path = source / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 1]}))
    assert put("m", source).eos == (2, 1)
