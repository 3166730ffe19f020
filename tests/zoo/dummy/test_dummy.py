"""Zoos of shapes without weights: what a config asks for, shared as real weights would be, and
refused where numbers are wanted."""

import json
from pathlib import Path

import pytest

from tests import builders
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.dummy.make import make
from zoo.dummy.recipe import PRESETS, Recipe
from zoo.dummy.store import DummyStore
from zoo.errors import BadSource, MissingObject, UnsupportedOption, ZooError
from zoo.export import export
from zoo.keeping.reach import Reach
from zoo.keeping.sweep import sweep
from zoo.keeping.verify import verify
from zoo.manifest import LowRank, NormWeights, Variant
from zoo.progress import Quiet
from zoo.sources.checkpoint import read_checkpoint
from zoo.store import Store
from zoo.transfer.move import Move, push

MIX = Recipe("tiny", loras=2, rank=4, lasts=2, last_layers=1, fulls=1, deltas=1, delta_rank=8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dummy") / "zoo"
    make(root, MIX, Quiet())
    return root


def variant(root: Path, name: str) -> Variant:
    return Catalog(root).variant(name)


def tensors(root: Path, name: str) -> frozenset[str]:
    catalog = Catalog(root)
    return Reach(catalog).footprint(catalog.variant(name)).tensors


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "phi3", "olmo2"])
def test_a_dummys_units_are_those_of_the_checkpoint_it_stands_for(family: str, tmp_path: Path):
    real = getattr(builders, f"tiny_{family}")(tmp_path / "real")
    add(tmp_path / "zoo", "base", str(real), AddOptions(), Quiet())
    make(tmp_path / "dummy", Recipe(str(real), dtype="float32", loras=1), Quiet())
    shapes = []
    for root in (tmp_path / "zoo", tmp_path / "dummy"):
        catalog, store = Catalog(root), DummyStore(root)
        units = [catalog.unit(d) for d in catalog.chain(catalog.variant("base").chain).units]
        shapes.append(
            [(u.spec, {role: store.info(d) for role, d in u.tensors.items()}) for u in units]
        )
    assert shapes[0] == shapes[1]
    names = read_checkpoint(real, "real").tensors
    assert variant(tmp_path / "dummy", "base").tensors.keys() == names.keys()


@pytest.mark.parametrize(
    ("preset", "weights"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-2-7b", 6_738_415_616),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_are_as_large_as_their_models(preset: str, weights: int, tmp_path: Path):
    make(tmp_path, Recipe(preset), Quiet())
    objects = Catalog(tmp_path).objects().values()
    assert sum(info.nbytes for info in objects if info.dtype == "BF16") == 2 * weights
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 4e6


def test_variants_share_what_real_ones_would(mixed: Path):
    base = tensors(mixed, "base")
    assert not tensors(mixed, "full-0") & base
    assert tensors(mixed, "lora-0") > base
    assert not (tensors(mixed, "lora-0") - base) & tensors(mixed, "lora-1")
    # One layer: four matrices and a norm, three matrices and a norm.
    assert len(tensors(mixed, "last-0") - base) == len(base - tensors(mixed, "last-0")) == 9
    assert tensors(mixed, "delta-0") > base
    kinds = {one.name: (one.kind, one.store, one.dummy) for one in Catalog(mixed).variants()}
    assert kinds["last-1"] == ("partial", "exact", True)
    assert kinds["full-0"] == ("full", "exact", True)
    assert kinds["delta-0"] == ("full", "delta", True)
    assert kinds["lora-1"] == ("lora", "exact", True)


def test_a_delta_has_a_piece_for_every_tensor_that_moved(mixed: Path):
    catalog = Catalog(mixed)
    chain = catalog.chain(variant(mixed, "delta-0").chain)
    pieces = [p for a in chain.attachments if a for p in catalog.attachment(a).pieces]
    layers = PRESETS["tiny"].layers
    ranks = [p.rank for p in pieces if isinstance(p, LowRank)]
    assert ranks == [8] * (7 * layers + 2)
    assert sum(isinstance(p, NormWeights) for p in pieces) == 2 * layers + 1


def test_equal_seeds_make_equal_zoos_and_others_do_not(mixed: Path, tmp_path: Path):
    make(tmp_path / "again", MIX, Quiet())
    make(tmp_path / "other", Recipe("tiny", seed=1), Quiet())
    assert [v.chain for v in Catalog(mixed).variants()] == [
        v.chain for v in Catalog(tmp_path / "again").variants()
    ]
    assert not tensors(tmp_path / "other", "base") & tensors(mixed, "base")


def test_a_second_recipe_adds_what_is_missing(tmp_path: Path):
    make(tmp_path, Recipe("tiny"), Quiet())
    assert make(tmp_path, Recipe("tiny", loras=2), Quiet()) == ["lora-0", "lora-1"]
    assert make(tmp_path, Recipe("tiny", loras=3), Quiet()) == ["lora-2"]
    sweep(tmp_path, delete=True, wait_s=1, progress=Quiet())
    assert DummyStore(tmp_path).info(variant(tmp_path, "base").tensors["lm_head.weight"]).nbytes


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (Recipe("llama-9"), "none of the shapes tiny, smollm2-135m"),
        (Recipe("tiny", dtype="int8"), "--dtype 'int8' is unknown"),
        (Recipe("tiny", loras=-1), "--loras counts variants"),
        (Recipe("tiny", rank=0), "--rank must be at least 1"),
        (Recipe("tiny", lasts=1, last_layers=5), "more than the 4"),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(recipe: Recipe, told: str, tmp_path: Path):
    with pytest.raises(ZooError) as caught:
        make(tmp_path / "zoo", recipe, Quiet())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zoo_of_another_kind_is_left_alone(tmp_path: Path):
    base = builders.tiny_llama(tmp_path / "base")
    add(tmp_path / "zoo", "base", str(base), AddOptions(golden=False), Quiet())
    with pytest.raises(BadSource, match="folder of their own"):
        make(tmp_path / "zoo", Recipe("tiny"), Quiet())
    make(tmp_path / "dummy", Recipe("tiny"), Quiet())
    with pytest.raises(BadSource, match="another config, seed"):
        make(tmp_path / "dummy", Recipe("tiny", seed=1, loras=1), Quiet())


def test_a_config_that_no_family_reads_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "x"}))
    with pytest.raises(ZooError):
        make(tmp_path / "zoo", Recipe(str(tmp_path)), Quiet())


def test_what_needs_weights_is_refused_in_one_sentence(mixed: Path, tmp_path: Path):
    for wanted in (
        lambda: verify(mixed, Quiet()),
        lambda: export(mixed, "lora-0", tmp_path / "out", Quiet()),
        lambda: push(mixed, str(tmp_path / "there"), Move(), Quiet()),
    ):
        with pytest.raises(UnsupportedOption, match="shapes without weights"):
            wanted()
    with pytest.raises(MissingObject):
        Store(mixed).tensor(next(iter(tensors(mixed, "base"))))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "there").exists()
