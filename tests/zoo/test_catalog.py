"""The catalog appears, changes and vanishes under its readers without harm."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from zoo.catalog import Catalog, Publication
from zoo.errors import DamagedCatalog, NameTaken, UnknownVariant
from zoo.manifest import (
    Chain,
    ChainDigest,
    EmbedSpec,
    ObjectDigest,
    Unit,
    UnitDigest,
    Variant,
    digest,
)
from zoo.store import ObjectInfo

TENSOR = ObjectDigest("a" * 64)


def publication(name: str, hidden: int = 4) -> Publication:
    unit = Unit(EmbedSpec(hidden, 10), {"tokens.weight": TENSOR})
    chain = Chain((UnitDigest(digest(unit)),), (None,))
    variant = Variant(
        name=name,
        chain=ChainDigest(digest(chain)),
        family="llama",
        kind="base",
        store="exact",
        base=None,
        source="somewhere",
        created=1.0,
        hidden=hidden,
        vocabulary=10,
        context=16,
        dtype="float32",
        eos=(2,),
        files={},
        tensors={"w": TENSOR},
        report={"shared": 0, "changed": 1, "attached": 0},
    )
    return Publication(
        variant, chain, {chain.units[0]: unit}, {}, {TENSOR: ObjectInfo("F32", (10, 4), 160)}
    )


def test_a_zoo_that_is_not_there_is_empty(root: Path):
    catalog = Catalog(root)
    assert catalog.variants() == []
    assert catalog.version() == 0
    with pytest.raises(UnknownVariant, match="the zoo is empty"):
        catalog.variant("a")
    assert not root.exists()


def test_what_is_published_is_read_back(root: Path):
    one = publication("one")
    writer = Catalog(root, writable=True)
    writer.publish(one)
    reader = Catalog(root)
    assert reader.variants() == [one.variant]
    assert reader.variant("one") == one.variant
    assert reader.chain(one.variant.chain) == one.chain
    assert reader.unit(one.chain.units[0]) == one.units[one.chain.units[0]]
    assert reader.objects() == one.objects


def test_the_version_tells_of_every_change_by_others(root: Path):
    reader, writer = Catalog(root), Catalog(root, writable=True)
    seen = [reader.version()]
    writer.publish(publication("one"))
    seen.append(reader.version())
    assert reader.version() == seen[-1]
    writer.publish(publication("two"))
    seen.append(reader.version())
    writer.remove("one")
    seen.append(reader.version())
    assert len(set(seen)) == 4


def test_a_zoo_that_is_deleted_and_made_again_is_followed(root: Path):
    reader, writer = Catalog(root), Catalog(root, writable=True)
    writer.publish(publication("one"))
    before = reader.version()
    writer.close()
    shutil.rmtree(root)
    assert reader.variants() == []
    assert reader.version() == 0
    Catalog(root, writable=True).publish(publication("two"))
    assert [variant.name for variant in reader.variants()] == ["two"]
    assert reader.version() not in {0, before}


def test_a_name_is_replaced_only_when_asked(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    with pytest.raises(NameTaken, match="--replace"):
        writer.publish(publication("one", hidden=8))
    assert writer.variant("one").hidden == 4
    writer.publish(publication("one", hidden=8), replace=True)
    assert writer.variant("one").hidden == 8


def test_a_failed_transaction_leaves_nothing(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    before = writer.objects()
    other = publication("one", hidden=8)
    other.objects[ObjectDigest("b" * 64)] = ObjectInfo("F32", (1,), 4)
    with pytest.raises(NameTaken):
        writer.publish(other)
    assert writer.objects() == before
    with pytest.raises(DamagedCatalog):
        writer.chain(other.variant.chain)


def test_a_removed_variants_manifests_stay_until_they_are_pruned(root: Path):
    one = publication("one")
    writer = Catalog(root, writable=True)
    writer.publish(one)
    writer.remove("one")
    assert writer.chain(one.variant.chain) == one.chain
    writer.prune([])
    assert writer.objects() == {}
    with pytest.raises(DamagedCatalog, match="has no"):
        writer.chain(one.variant.chain)


def test_unknown_names_come_with_those_that_are_known(root: Path):
    writer = Catalog(root, writable=True)
    for name in "abcdefghijk":
        writer.publish(publication(name))
    with pytest.raises(UnknownVariant, match=r"there are a, b, c, d, e, f, g, h, \.\.\."):
        writer.variant("z")


def test_a_catalog_of_a_newer_version_is_refused(root: Path):
    Catalog(root, writable=True).publish(publication("one"))
    with sqlite3.connect(root / "catalog.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DamagedCatalog, match="format 99"):
        Catalog(root).variants()


def test_a_file_that_is_no_catalog_is_refused(root: Path):
    root.mkdir()
    (root / "catalog.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DamagedCatalog, match="cannot be opened"):
        Catalog(root).variants()
