"""Every kind of tuning computes in the zoo what its own library computes, comes back bit-equal, and
is called what it is; what cannot be done exactly is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench import adapters, reference
from bench.variants import randomize
from tests import builders
from tests.zoo.adding.test_add import assert_same_tensors
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.door import Manifests, offline
from zoo.errors import BadAdapter, BadSource, NotEqual, ZooError
from zoo.export import export
from zoo.manifest import Attachment, Variant, virtual_tokens
from zoo.progress import Quiet
from zoo.store import Store

# GPT-2 has biases, norms with biases, and matrices that lie the other way.
CASES = [
    *(("llama", kind) for kind in [*adapters.KINDS, *adapters.BOTTLENECKS]),
    *(("gpt2", kind) for kind in ("lora:biases beside", "dora", "ia3:inputs", "norm")),
]
# Largest difference of two logits, over the largest logit.
ROUNDING = 2e-5


class Told(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def say(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a tiny Llama, one with a tied head, and a tiny GPT-2, beside their sources."""
    folder = tmp_path_factory.mktemp("bases")
    builders.tiny_llama(folder / "llama")
    builders.tiny_llama(folder / "tied", seed=7, tie_word_embeddings=True)
    builders.tiny_gpt2(folder / "gpt2")
    for name in ("llama", "tied", "gpt2"):
        add(folder / "zoo", name, str(folder / name), AddOptions(), Quiet())
    return folder


def put(bases: Path, source: Path | str, base: str, **options: Any) -> Variant:
    return add(
        bases / "zoo",
        "tuned",
        str(source),
        AddOptions(base=base, replace=True, **options),
        Quiet(),
    )


def logits_of(root: Path, variant: Variant, tokens: list[int]) -> torch.Tensor:
    catalog = Catalog(root)
    chain = catalog.chain(variant.chain)
    manifests = Manifests(
        [(unit, catalog.unit(unit)) for unit in chain.units],
        [None if a is None else (a, catalog.attachment(a)) for a in chain.attachments],
        variant.context,
    )
    with offline(root, ops="torch") as runner:
        return runner.load(manifests).logits([tokens])[0]


def reference_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]


TOKENS = [7, 300, 2, 45, 7, 8, 9, 250, 3, 120, 121, 122, 5, 6, 64, 310, 1]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_a_kind_is_proven_and_comes_back_bit_equal(
    bases: Path, tmp_path: Path, base: str, kind: str
):
    source = adapters.make(kind, tmp_path / "source", bases / base)
    variant = put(bases, source, base)
    assert variant.kind == kind.partition(":")[0]
    assert variant.base == base
    assert variant.golden is not None
    assert variant.golden < ROUNDING
    out = export(bases / "zoo", "tuned", tmp_path / "out", Quiet())
    assert_same_tensors(source, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize(
    "kind", ["lora:embedding and head", "lora:tokens", "lora:whole embedding", "tokens"]
)
def test_a_tied_head_takes_what_peft_gives_it(bases: Path, tmp_path: Path, kind: str):
    source = adapters.make(kind, tmp_path / "source", bases / "tied")
    variant = put(bases, source, "tied")
    wanted = reference_logits(reference.load(bases / "tied", source), TOKENS)
    given = logits_of(bases / "zoo", variant, TOKENS)
    assert float((given - wanted).abs().max() / wanted.abs().max()) < ROUNDING


@pytest.mark.parametrize("kind", adapters.MERGED)
def test_a_kind_without_pieces_is_merged_exactly(bases: Path, tmp_path: Path, kind: str):
    source = adapters.make(kind, tmp_path / "source", bases / "llama")
    told = Told()
    root = bases / "zoo"
    variant = add(root, "tuned", str(source), AddOptions(base="llama", replace=True), told)
    assert variant.kind == f"merged:{kind.partition(':')[0]}"
    assert variant.report["changed"] > 0
    assert any("MB of its weights are the variant's own" in remark for remark in told.remarks)
    wanted = reference_logits(reference.load(bases / "llama", source), TOKENS)
    given = logits_of(root, variant, TOKENS)
    assert float((given - wanted).abs().max() / wanted.abs().max()) < ROUNDING
    assert_same_tensors(source, export(root, "tuned", tmp_path / "out", Quiet()))


def test_virtual_tokens_take_their_part_of_the_context(bases: Path, tmp_path: Path):
    source = adapters.make("prefix:projected", tmp_path / "source", bases / "llama")
    variant = put(bases, source, "llama")
    assert variant.context == 256 - 19
    attachments = [
        Catalog(bases / "zoo").attachment(digest)
        for digest in Catalog(bases / "zoo").chain(variant.chain).attachments
        if digest
    ]
    assert virtual_tokens(attachments) == 19


def test_norm_and_low_rank_tunings_share_every_unit(bases: Path, tmp_path: Path):
    for kind, attached in (("norm", 9), ("lora:tokens", 9), ("dora", 8)):
        source = adapters.make(kind, tmp_path / kind, bases / "llama")
        report = put(bases, source, "llama").report
        assert report == {"shared": 10, "changed": 0, "attached": attached}, kind


def test_saved_modules_that_are_the_bases_own_cost_nothing(bases: Path, tmp_path: Path):
    source = adapters.make("lora", tmp_path / "source", bases / "llama")
    base = load_file(bases / "llama" / "model.safetensors")
    path = source / "adapter_model.safetensors"
    own = {"base_model.model.lm_head.weight": base["lm_head.weight"]}
    save_file(load_file(path) | own, path, {"format": "pt"})
    assert put(bases, source, "llama", golden=False).report["changed"] == 0


def grown(path: Path, base: Path, added: int = 3) -> Path:
    """A LoRA whose model was given new tokens, as peft saves it, with a tokenizer of its own."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{i}>" for i in range(added)])
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(builders.VOCABULARY + added, mean_resizing=False)
        config = adapters.KINDS["lora"](adapters.names_of(base))
        adapted = peft.get_peft_model(model, config)
        randomize(adapted, 1)
        adapted.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("base", ["llama", "tied"])
def test_added_tokens_come_with_their_own_tokenizer(bases: Path, tmp_path: Path, base: str):
    source = grown(tmp_path / "source", bases / base)
    variant = put(bases, source, base)
    assert variant.vocabulary == builders.VOCABULARY + 3
    assert variant.golden is not None
    assert {"tokenizer.json", "chat_template.jinja"} <= set(variant.files) - set(variant.borrowed)
    store = Store(bases / "zoo")
    assert b"<new2>" in store.blob(variant.files["tokenizer.json"])
    assert logits_of(bases / "zoo", variant, [*TOKENS, 321, 322]).shape[1] == 323


def damaged(bases: Path, tmp_path: Path, kind: str, settings: dict[str, Any]) -> Path:
    source = adapters.make(kind, tmp_path / "source", bases / "llama")
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return source


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("tokens", {"token_indices": [1, 2]}, r"shape \[3, 64\], .* \[2, 64\]"),
        ("tokens", {"token_indices": [1, 1, 2]}, "each must be named once"),
        ("tokens", {"token_indices": None}, "is not valid"),
        ("prompt", {"num_virtual_tokens": 4}, r"shape \[3, 64\]"),
        ("prompt", {"num_virtual_tokens": 0}, "no virtual tokens"),
        ("prefix", {"num_transformer_submodules": 2}, "an encoder and a decoder"),
        ("prompt", {"peft_type": "PREFIX_TUNING"}, "made for another base"),
        ("prompt", {"peft_type": "MULTITASK_PROMPT_TUNING"}, "requests do not carry"),
        ("ia3", {"peft_type": "PROMPT_TUNING"}, "'prompt_embeddings' and nothing else"),
        ("ia3", {"peft_type": "LORA"}, "made for another base"),
        ("bottleneck", {"config": adapters.SERIAL | {"use_gating": True}}, "gates"),
        ("bottleneck", {"config": adapters.SERIAL | {"inv_adapter": "nice"}}, "invertible"),
        ("bottleneck", {"config": adapters.SERIAL | {"non_linearity": "mish"}}, "'mish'"),
        ("bottleneck", {"config": adapters.SERIAL | {"original_ln_after": False}}, "not at all"),
        ("bottleneck", {"config": {"architecture": "lora", "r": 8}}, "kind 'lora'"),
        ("bottleneck", {"config": "houlsby"}, "is not valid"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    bases: Path, tmp_path: Path, kind: str, settings: dict[str, Any], message: str
):
    source = damaged(bases, tmp_path, kind, settings)
    before = set(Store(bases / "zoo").digests())
    with pytest.raises(ZooError, match=message) as caught:
        put(bases, source, "llama")
    assert "\n" not in str(caught.value)
    assert set(Store(bases / "zoo").digests()) == before


@pytest.mark.parametrize("kind", ["ia3", "prefix", "prompt", "norm", "dora", "bottleneck"])
def test_an_adapter_of_another_base_is_refused(bases: Path, tmp_path: Path, kind: str):
    builders.tiny_llama(tmp_path / "wide", hidden_size=32, intermediate_size=48)
    source = adapters.make(kind, tmp_path / "source", tmp_path / "wide")
    with pytest.raises(BadAdapter, match="made for another base"):
        put(bases, source, "llama")


def test_the_golden_check_refuses_a_chain_that_is_not_its_source(bases: Path, tmp_path: Path):
    """The scale in the config is not what the pieces get: the place is named, nothing is left."""
    source = adapters.make("lora", tmp_path / "source", bases / "llama")
    before = set(Store(bases / "zoo").digests())
    path = source / "adapter_config.json"
    config = json.loads(path.read_text())
    # peft takes layer 2 for none of its own; the file holds pieces for it all the same.
    path.write_text(json.dumps(config | {"layers_to_transform": [0, 1, 3]}))
    with pytest.raises(NotEqual, match="first at layer 2"):
        put(bases, source, "llama")
    assert set(Store(bases / "zoo").digests()) == before
    assert put(bases, source, "llama", golden=False).golden is None


def test_weighted_adapters_add_up_as_peft_adds_them(bases: Path, tmp_path: Path):
    root = bases / "zoo"
    terms = {"a": ("lora:patterns", 1.0), "b": ("lora:embedding and head", -0.5)}
    for name, (kind, _) in terms.items():
        adapters.make(kind, tmp_path / name, bases / "llama", seed=ord(name))
        source = str(tmp_path / name)
        add(root, name, source, AddOptions(base="llama", replace=True), Quiet())
    before = Store(root).disk_bytes()
    variant = add(root, "sum", "a + -0.5*b", AddOptions(replace=True), Quiet())
    assert (variant.kind, variant.base) == ("sum", "llama")
    assert Store(root).disk_bytes() - before < 4096, "it shares the tensors of its terms"
    assert variant.golden is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.float32)
        both = peft.PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
        both.load_adapter(tmp_path / "b", "b")
        names, weights = list(terms), [weight for _, weight in terms.values()]
        both.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        both.set_adapter("sum")
    wanted = reference_logits(both.eval(), TOKENS)
    given = logits_of(root, variant, TOKENS)
    assert float((given - wanted).abs().max() / wanted.abs().max()) < ROUNDING
    out = export(root, "sum", tmp_path / "out", Quiet())
    again = reference_logits(reference.load(bases / "llama", out), TOKENS)
    assert float((again - wanted).abs().max() / wanted.abs().max()) < ROUNDING


def test_what_does_not_add_up_is_refused(bases: Path, tmp_path: Path):
    root = bases / "zoo"
    for kind in ("lora", "dora", "prefix", "lora:tokens"):
        source = adapters.make(kind, tmp_path / kind, bases / "llama")
        name = kind.replace(":", "-")
        add(root, name, str(source), AddOptions(base="llama", replace=True), Quiet())
    other = adapters.make("lora", tmp_path / "other", bases / "gpt2")
    add(root, "other", str(other), AddOptions(base="gpt2", replace=True), Quiet())
    for asked, message in {
        "lora+0.5*dora": "gains .* do not add up",
        "prefix+lora": "only one can stand",
        "lora+lora-tokens": "whole tensors",
        "lora+llama": "'llama' is no adapter",
        "lora+other": "several bases",
        "0*lora": "changes nothing",
    }.items():
        with pytest.raises(BadAdapter, match=message):
            add(root, "sum", asked, AddOptions(replace=True), Quiet())
    with pytest.raises(BadSource, match="nothing is there"):
        add(root, "sum", "lora*2", AddOptions(replace=True), Quiet())


def test_an_adapter_saved_as_a_pickle_by_the_library_is_refused(bases: Path, tmp_path: Path):
    source = adapters.make("bottleneck", tmp_path / "source", bases / "llama")
    (source / "adapter.safetensors").rename(source / "pytorch_adapter.bin")
    with pytest.raises(ZooError, match="pickle file"):
        put(bases, source, "llama")


def test_a_head_that_was_trained_beside_a_bottleneck_is_the_variants_own(
    bases: Path, tmp_path: Path
):
    source = adapters.make("bottleneck", tmp_path / "source", bases / "llama")
    head = load_file(source / adapters.HEAD_FILE)["lm_head.weight"]
    save_file({"lm_head.weight": head * 2}, source / adapters.HEAD_FILE)
    variant = put(bases, source, "llama")
    assert variant.report == {"shared": 9, "changed": 1, "attached": 4}
    shutil.rmtree(source)
    assert isinstance(Catalog(bases / "zoo").variant("tuned").files, dict)


def test_pieces_are_what_the_manifest_calls_them(bases: Path, tmp_path: Path):
    source = adapters.make("ia3", tmp_path / "source", bases / "gpt2")
    variant = put(bases, source, "gpt2")
    catalog = Catalog(bases / "zoo")
    found: list[Attachment | None] = [
        None if digest is None else catalog.attachment(digest)
        for digest in catalog.chain(variant.chain).attachments
    ]
    tags = [[p.__struct_config__.tag for p in a.pieces] if a else [] for a in found]
    assert tags[1:3] == [["bias", "gain"], ["input_gain"]]
