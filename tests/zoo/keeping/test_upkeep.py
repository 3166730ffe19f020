"""Verify, remove and sweep: what is damaged is found, what is not needed goes."""

import os
import random
import sqlite3
import time
from pathlib import Path

import pytest

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import DamagedObject, MissingObject, UnknownVariant, ZooBusy
from zoo.keeping.aliases import pin, unpin
from zoo.keeping.history import history
from zoo.keeping.listing import Listing
from zoo.keeping.reach import Reach
from zoo.keeping.remove import remove
from zoo.keeping.sweep import Rubbish, sweep
from zoo.keeping.verify import Damage, verify
from zoo.lock import writing
from zoo.manifest import ObjectDigest
from zoo.packed import Form, PackedForms, packed_files
from zoo.progress import Quiet
from zoo.store import Store
from zoo.work import work_folder


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


def test_adding_again_heals_a_difference_that_still_reads_well(
    root: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    put("base", checkpoints / "llama")
    full = builders.fine_tune(tmp_path / "full", checkpoints / "llama", ["up_proj"], scale=1e-4)
    variant = put("full", full, base="base")
    path = Store(root).path(variant.tensors["model.layers.0.mlp.up_proj.weight"])
    assert path.suffix == ".difference"
    # Its last byte is of the seal: what it decodes to is whole.
    flip(path)
    assert len(verify(root, Quiet()).damages) == 1
    put("full", full, base="base", replace=True)
    assert verify(root, Quiet()).damages == []


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


def test_a_sweep_takes_the_packed_forms_of_what_goes(family: Path):
    own = Catalog(family).variant("last").tensors["model.layers.3.mlp.up_proj.weight"]
    shared = Catalog(family).variant("base").tensors["model.layers.0.mlp.up_proj.weight"]
    gone = ObjectDigest("f" * 64)
    for digest in (own, shared, gone):
        PackedForms(family, "panels").write(Form(digest, turned=False), memoryview(b"form"))
    of = {digest: path for path, digest in packed_files(family)}
    assert swept(family, delete=False).leftovers == [of[gone]]
    remove(family, "last", wait_s=1, progress=Quiet())
    rubbish = swept(family)
    assert set(rubbish.leftovers) == {of[own], of[gone]}
    assert list(packed_files(family)) == [(of[shared], shared)]


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


def test_a_sweep_takes_work_that_nobody_goes_on_with(family: Path):
    fresh, stale = work_folder(family, "a", 1), work_folder(family, "a", 2)
    for folder in (fresh, stale):
        folder.mkdir(parents=True)
        (folder / "training.safetensors").write_bytes(b"12345")
    eight_days_ago = time.time() - 8 * 24 * 3600
    os.utime(stale, (eight_days_ago, eight_days_ago))
    expected = Rubbish(work=[stale], bytes=5)
    assert swept(family, delete=False) == expected
    assert stale.is_dir()
    assert swept(family) == expected
    assert not stale.exists()
    assert (fresh / "training.safetensors").is_file()
    assert swept(family) == Rubbish()


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
    assert 0 < stats.disk_bytes <= sum(sizes.values()) + 200 * len(sizes)
    assert stats.model_bytes > stats.source_bytes > stats.tensor_bytes
    by_name = {row.name: row for row in stats.by_variant}
    assert by_name["last"].own_bytes > by_name["tuned"].own_bytes > 0
    assert by_name["base"].blocks == 3


def test_a_sweep_frees_older_versions_and_says_so(
    family: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    put(
        "last",
        builders.fine_tune(tmp_path / "new", checkpoints / "llama", ["layers.2."]),
        replace=True,
    )
    assert Catalog(family).variant("last@1").report["changed"] == 2
    rubbish = swept(family, delete=False)
    assert rubbish.versions == ["last@1"]
    assert len(rubbish.objects) == 9
    assert Catalog(family).variant("last@1").name == "last@1"
    assert swept(family) == rubbish
    assert [(row.reference, row.is_there) for row in history(family, "last")] == [
        ("last@1", False), ("last@2", True),
    ]  # fmt: skip
    with pytest.raises(UnknownVariant, match="swept away"):
        Catalog(family).variant("last@1")
    assert swept(family) == Rubbish()


def test_a_sweep_keeps_what_an_alias_stays_with(family: Path, put: Adder, checkpoints: Path):
    chain = Catalog(family).variant("last").chain
    pin(family, "stable", "last", wait_s=1, progress=Quiet())
    remove(family, "last", wait_s=1, progress=Quiet())
    assert swept(family) == Rubbish()
    assert Catalog(family).variant("stable").chain == chain
    (row,) = history(family, "last")
    assert (row.is_current, row.is_there, row.aliases) == (False, True, ["stable"])
    unpin(family, "stable", wait_s=1, progress=Quiet())
    assert swept(family).versions == ["last@1"]
    with pytest.raises(UnknownVariant, match="no alias 'stable'"):
        unpin(family, "stable", wait_s=1, progress=Quiet())


def test_an_older_version_of_equal_content_outlives_the_sweep(
    family: Path, put: Adder, checkpoints: Path
):
    put("base", checkpoints / "llama", replace=True)
    assert swept(family).versions == []
    assert [row.is_there for row in history(family, "base")] == [True, True]


def test_a_listing_has_a_line_for_an_alias_of_an_older_version(
    family: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    pin(family, "stable", "last", wait_s=1, progress=Quiet())
    rows = {row.name: row for row in Listing(family).rows()}
    assert rows.keys() == {"base", "last", "tuned"}
    assert (rows["last"].reference, rows["last"].aliases) == ("last@1", ["stable"])
    put(
        "last",
        builders.fine_tune(tmp_path / "new", checkpoints / "llama", ["layers.2."]),
        replace=True,
    )
    rows = {row.name: row for row in Listing(family).rows()}
    assert {name: row.reference for name, row in rows.items()} == {
        "base": "base@1", "last": "last@2", "stable": "last@1", "tuned": "tuned@1",
    }  # fmt: skip
    assert Listing(family).detail("stable").variant == rows["stable"]
    assert (
        Listing(family, "last@1").detail("last@1").chain == Catalog(family).variant("stable").chain
    )


def test_history_of_the_unknown_is_refused(family: Path):
    pin(family, "stable", "last", wait_s=1, progress=Quiet())
    with pytest.raises(UnknownVariant, match="called 'nobody'"):
        history(family, "nobody")
    with pytest.raises(UnknownVariant, match="no variant's own name"):
        history(family, "stable")


def test_verify_names_aliases_and_older_versions(
    family: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    pin(family, "stable", "last", wait_s=1, progress=Quiet())
    put(
        "last",
        builders.fine_tune(tmp_path / "new", checkpoints / "llama", ["layers.2."]),
        replace=True,
    )
    own = Catalog(family).variant("stable").tensors["model.layers.3.mlp.up_proj.weight"]
    flip(Store(family).path(own))
    (damage,) = verify(family, Quiet()).damages
    assert damage == Damage(own, "damaged", ["stable", "last@1"])


def test_a_bad_parent_touches_who_uses_its_differences(
    root: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    put("base", checkpoints / "llama")
    full = builders.fine_tune(tmp_path / "full", checkpoints / "llama", ["up_proj"], scale=1e-4)
    put("full", full, base="base")
    store, name = Store(root), "model.layers.0.mlp.up_proj.weight"
    parent, child = (Catalog(root).variant(one).tensors[name] for one in ("base", "full"))
    assert store.parent(child) == parent
    remove(root, "base", wait_s=1, progress=Quiet())
    swept(root)
    assert store.has(parent), "a difference keeps what it is a difference to"
    assert verify(root, Quiet()).damages == []
    flip(store.path(parent))
    found = {damage.digest: damage for damage in verify(root, Quiet()).damages}
    assert found == {
        parent: Damage(parent, "damaged", ["full"]),
        child: Damage(child, "unreadable", ["full"]),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".difference", ".blob"])
def test_every_flipped_bit_of_an_object_is_found(
    root: Path, put: Adder, checkpoints: Path, tmp_path: Path, suffix: str
):
    put("base", checkpoints / "llama")
    full = builders.fine_tune(tmp_path / "full", checkpoints / "llama", ["up_proj"], scale=1e-4)
    put("full", full, base="base")
    store = Store(root)
    path = min(root.rglob(f"*{suffix}"), key=lambda path: path.stat().st_size)
    whole, digest = path.read_bytes(), ObjectDigest(path.stem)
    path.chmod(0o644)
    draw = random.Random(3)
    # Every bit of the head, where lengths, names and shapes are, and a sample of the rest.
    places = [*range(min(len(whole), 400)), *draw.choices(range(len(whole)), k=100)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises((DamagedObject, MissingObject)):
            store.verify(digest)
    path.write_bytes(whole)
    assert verify(root, Quiet()).damages == []


@pytest.mark.parametrize("table", ["chains", "units", "attachments", "versions", "variants"])
def test_a_changed_row_of_the_catalog_is_found(family: Path, table: str):
    with sqlite3.connect(family / "catalog.sqlite") as connection:
        key = "digest" if table in {"chains", "units", "attachments"} else "name"
        (name, data) = connection.execute(f"SELECT {key}, manifest FROM {table}").fetchone()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        update = f"UPDATE {table} SET manifest = ? WHERE {key} = ?"
        connection.execute(update, (bytes(flipped), name))
    connection.close()
    named = {one.digest.partition("@")[0]: one for one in verify(family, Quiet()).damages}
    assert (named[name].fault, bool(named[name].variants)) == ("damaged", True)


def test_a_row_that_is_gone_is_found(family: Path):
    with sqlite3.connect(family / "catalog.sqlite") as connection:
        unit = Catalog(family).chain(Catalog(family).variant("last").chain).units[8]
        connection.execute("DELETE FROM units WHERE digest = ?", (unit,))
    connection.close()
    (damage,) = verify(family, Quiet()).damages
    assert (damage.digest, damage.variants) == (unit, ["last@1"])
