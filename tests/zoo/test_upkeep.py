"""Verify, remove and sweep: what is damaged is found, what is not needed goes."""

from pathlib import Path

import pytest

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import UnknownVariant, ZooBusy
from zoo.listing import Listing
from zoo.lock import writing
from zoo.manifest import ObjectDigest
from zoo.progress import Quiet
from zoo.reach import Reach
from zoo.remove import remove
from zoo.store import Store
from zoo.sweep import Rubbish, sweep
from zoo.verify import Damage, verify


def swept(root: Path, *, delete: bool = True) -> Rubbish:
    return sweep(root, delete=delete, wait_s=1, progress=Quiet())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.fixture
def family(root: Path, put: Adder, checkpoints: Path, adapter: Path, tmp_path: Path) -> Path:
    """A zoo with a base, an adapter and a partial fine-tune."""
    put("base", checkpoints / "llama")
    put("tuned", adapter)
    put("last", builders.fine_tune(tmp_path / "last", checkpoints / "llama", ["layers.3."]))
    return root


def test_verify_names_the_object_and_the_variants_it_touches(family: Path):
    catalog, store = Catalog(family), Store(family)
    everyone = catalog.variant("last").tensors["model.layers.0.mlp.up_proj.weight"]
    lora = next(iter(catalog.variant("tuned").tensors.values()))
    own = catalog.variant("last").tensors["model.layers.3.mlp.up_proj.weight"]
    tokenizer = catalog.variant("base").files["tokenizer.json"]
    for digest in (everyone, lora, tokenizer):
        flip(store.path(digest))
    store.delete(own)
    found = verify(family, Quiet()).damages
    assert sorted(found, key=lambda damage: damage.digest) == sorted(
        [
            Damage(everyone, "damaged", ["base", "last", "tuned"]),
            Damage(lora, "damaged", ["tuned"]),
            Damage(own, "missing", ["last"]),
            Damage(tokenizer, "damaged", ["base", "last", "tuned"]),
        ],
        key=lambda damage: damage.digest,
    )


def test_adding_again_heals(family: Path, put: Adder, checkpoints: Path):
    store = Store(family)
    digest = Catalog(family).variant("base").tensors["lm_head.weight"]
    flip(store.path(digest))
    put("again", checkpoints / "llama")
    assert verify(family, Quiet()).damages == []


def test_removing_merges_blocks_again(family: Path):
    before = Listing(family).blocks()
    assert [row.units for row in before if "tuned" in row.variants] == [7, 2, 1]
    remove(family, "last", wait_s=1, progress=Quiet())
    (row,) = Listing(family).blocks()
    assert (row.first, row.last, row.variants) == (0, 10, ["base", "tuned"])


def test_removing_the_unknown_is_refused(root: Path):
    with pytest.raises(UnknownVariant):
        remove(root, "m", wait_s=1, progress=Quiet())
    assert not root.exists()


def test_a_sweep_without_yes_only_tells(family: Path):
    remove(family, "last", wait_s=1, progress=Quiet())
    before = set(Store(family).digests())
    rubbish = swept(family, delete=False)
    assert len(rubbish.objects) == 9
    assert rubbish.bytes > 0
    assert set(Store(family).digests()) == before


def test_a_sweep_deletes_what_nothing_reaches_and_no_more(family: Path):
    remove(family, "last", wait_s=1, progress=Quiet())
    size = Store(family).disk_bytes()
    rubbish = swept(family)
    assert size - Store(family).disk_bytes() == rubbish.bytes
    assert swept(family) == Rubbish()
    assert verify(family, Quiet()).damages == []
    catalog = Catalog(family)
    reached = Reach(catalog).digests(catalog.variants())
    assert set(catalog.objects()) == {digest for digest in reached if digest in catalog.objects()}
    assert set(Store(family).digests()) == set(catalog.objects())


def test_everything_can_go(family: Path):
    for name in ("base", "last", "tuned"):
        remove(family, name, wait_s=1, progress=Quiet())
    swept(family)
    assert list(Store(family).digests()) == []
    assert Catalog(family).objects() == {}


def test_an_adapter_keeps_the_units_of_a_base_that_is_gone(family: Path):
    remove(family, "base", wait_s=1, progress=Quiet())
    remove(family, "last", wait_s=1, progress=Quiet())
    swept(family)
    assert verify(family, Quiet()).damages == []
    assert [row.variants for row in Listing(family).blocks()] == [["tuned"]]


def test_a_sweep_of_nothing_makes_nothing(root: Path):
    assert swept(root) == Rubbish()
    assert not root.exists()


def test_a_sweep_waits_for_a_writer(family: Path):
    with (
        writing(family, 1, Quiet().say),
        pytest.raises(ZooBusy, match="try again"),
    ):
        sweep(family, delete=True, wait_s=0.1, progress=Quiet())


def test_a_strange_file_among_the_objects_is_left_alone(family: Path):
    stray = family / "objects" / "ab" / "cd"
    stray.mkdir(parents=True, exist_ok=True)
    (stray / "notes.txt").write_text("mine")
    swept(family)
    assert (stray / "notes.txt").read_text() == "mine"


def test_stats_add_up(family: Path):
    stats = Listing(family).stats()
    sizes = {key: info.nbytes for key, info in Catalog(family).objects().items()}
    variants = Catalog(family).variants()
    distinct: set[ObjectDigest] = set()
    for variant in variants:
        distinct.update(variant.tensors.values())
    assert stats.variants == 3
    assert stats.tensor_bytes == stats.serving_bytes == sum(sizes[key] for key in distinct)
    assert stats.source_bytes == sum(
        sizes[key] for variant in variants for key in variant.tensors.values()
    )
    assert stats.objects == len(sizes)
    assert sum(sizes.values()) <= stats.disk_bytes <= sum(sizes.values()) + 200 * len(sizes)
    assert stats.model_bytes > stats.source_bytes > stats.tensor_bytes
    by_name = {row.name: row for row in stats.by_variant}
    assert by_name["last"].own_bytes > by_name["tuned"].own_bytes > 0
    assert by_name["base"].blocks == 3
