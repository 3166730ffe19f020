"""A .gguf becomes what transformers makes of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import builders
from tests.zoo.conftest import Adder
from zoo.errors import ZooError
from zoo.export import export
from zoo.progress import Quiet


@pytest.fixture(scope="module")
def packed(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a .gguf."""
    folder = tmp_path_factory.mktemp("gguf")
    return builders.tiny_gguf(folder / "tiny.gguf", checkpoints / "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_exports_what_transformers_reads(
    root: Path, put: Adder, packed: Path, tmp_path: Path, dtype: str
):
    variant = put("m", packed, dtype=dtype)
    assert (variant.kind, variant.dtype, variant.eos, variant.context) == ("base", dtype, (2,), 256)
    theirs = AutoModelForCausalLM.from_pretrained(
        packed.parent, gguf_file=packed.name, dtype=getattr(torch, dtype)
    )
    out = export(root, "m", tmp_path / "out", Quiet())
    ours = AutoModelForCausalLM.from_pretrained(out)
    assert ours.dtype == theirs.dtype
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    text = "A block is a run of units, naïve 🙂."
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.chat_template == builders.CHAT_TEMPLATE


def test_its_tensors_are_those_of_the_checkpoint_it_was_made_from(
    put: Adder, packed: Path, checkpoints: Path
):
    original = put("original", checkpoints / "llama")
    assert put("packed", packed).tensors == original.tensors


@pytest.mark.parametrize("size", [0, 3, 4, 100, 5000, -100])
def test_a_truncated_file_is_refused(put: Adder, packed: Path, tmp_path: Path, size: int):
    path = tmp_path / "broken.gguf"
    path.write_bytes(packed.read_bytes()[:size])
    with pytest.raises(ZooError, match=r"broken\.gguf") as caught:
        put("m", path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(put: Adder, tmp_path: Path):
    path = tmp_path / "text.gguf"
    path.write_text("no model")
    with pytest.raises(ZooError, match="does not start with 'GGUF'"):
        put("m", path)


def test_a_folder_of_gguf_files_asks_for_one(put: Adder, packed: Path):
    with pytest.raises(ZooError, match=r"give the path of one, such as .*tiny\.gguf"):
        put("m", packed.parent)
