"""The catalog appears, changes and vanishes under its readers without harm."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from zoo.catalog import Alias, Catalog, Publication
from zoo.errors import DamagedCatalog, NameTaken, UnknownVariant
from zoo.findings import Findings
from zoo.keeping.audit import audit
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


def test_each_publish_of_a_name_is_its_next_version(root: Path):
    writer = Catalog(root, writable=True)
    for hidden in (4, 8, 16):
        writer.publish(publication("one", hidden), replace=True)
    chains = [publication("one", hidden).variant.chain for hidden in (4, 8, 16)]
    reader = Catalog(root)
    assert [(v.number, v.chain, v.is_there) for v in reader.versions("one")] == [
        (number, chain, True) for number, chain in enumerate(chains, 1)
    ]
    assert reader.variant("one").chain == reader.variant("one@3").chain == chains[2]
    assert (reader.variant("one@1").name, reader.variant("one@1").hidden) == ("one@1", 4)
    for reference in ("one@0", "one@4", "one@", "one@-1", "two@1", "one@99999999999999999999"):
        with pytest.raises(UnknownVariant, match="there are one"):
            reader.variant(reference)


def test_a_number_never_comes_back(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    writer.remove("one")
    with pytest.raises(UnknownVariant):
        writer.variant("one")
    assert writer.variant("one@1").hidden == 4
    writer.publish(publication("one", hidden=8))
    assert [version.number for version in writer.versions()] == [1, 2]
    assert writer.variant("one").hidden == 8


def test_a_swept_version_stays_in_the_history_only(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    writer.publish(publication("one", hidden=8), replace=True)
    new = publication("one", hidden=8)
    writer.prune({new.variant.chain, *new.units, *new.objects}, writer.versions("one")[:1])
    assert [version.is_there for version in writer.versions("one")] == [False, True]
    with pytest.raises(UnknownVariant, match="'one@1' has been swept away"):
        writer.variant("one@1")


def test_an_alias_stays_with_its_version(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    assert writer.set_alias("stable", "one") == Alias("stable", "one", 1)
    writer.publish(publication("one", hidden=8), replace=True)
    writer.set_alias("latest", "one")
    writer.set_alias("older", "one@1")
    writer.set_alias("copy", "stable")
    assert {v.name: v.hidden for v in Catalog(root).served()} == {
        "copy": 4, "latest": 8, "older": 4, "one": 8, "stable": 4,
    }  # fmt: skip
    assert [variant.name for variant in writer.variants()] == ["one"]
    writer.set_alias("stable", "one@2")
    assert (writer.variant("stable").name, writer.variant("stable").hidden) == ("stable", 8)
    writer.remove("one")
    assert writer.variant("older").hidden == 4
    writer.remove_alias("older")
    with pytest.raises(UnknownVariant, match="there are copy, latest, stable"):
        writer.variant("older")


def test_names_and_aliases_are_kept_apart(root: Path):
    writer = Catalog(root, writable=True)
    writer.publish(publication("one"))
    writer.set_alias("stable", "one")
    with pytest.raises(NameTaken, match="'one' is a variant"):
        writer.set_alias("one", "one")
    with pytest.raises(NameTaken, match="'stable' is an alias"):
        writer.publish(publication("stable"), replace=True)
    for reference in ("stable", "one@1"):
        with pytest.raises(UnknownVariant, match="no variant's own name"):
            writer.remove(reference)
    with pytest.raises(UnknownVariant, match="no alias 'one'"):
        writer.remove_alias("one")
    with pytest.raises(UnknownVariant, match="called 'two'"):
        writer.set_alias("other", "two")
    assert [alias.alias for alias in writer.aliases()] == ["stable"]


def first_format(root: Path, *, attachment: bytes | None = None) -> Publication:
    """A catalog as the first format had it."""
    one = publication("one")
    Catalog(root, writable=True).publish(one)
    with sqlite3.connect(root / "catalog.sqlite") as connection:
        for table in ("versions", "aliases", "findings", "finding_objects"):
            connection.execute(f"DROP TABLE {table}")
        if attachment is not None:
            connection.execute("INSERT INTO attachments VALUES ('a', ?)", (attachment,))
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    return one


def test_a_catalog_of_the_first_format_is_read_and_then_brought_up_to_date(root: Path):
    one = first_format(root)
    reader = Catalog(root)
    assert reader.variants() == reader.served() == [one.variant]
    assert [version.number for version in reader.versions()] == [1]
    assert reader.variant("one@1").chain == one.variant.chain
    assert reader.aliases() == []
    assert Findings(reader).objects() == {}
    before = reader.version()
    writer = Catalog(root, writable=True)
    writer.set_alias("stable", "one")
    writer.publish(publication("one", hidden=8), replace=True)
    assert reader.version() != before
    assert [variant.hidden for variant in reader.served()] == [8, 4]
    assert [(v.number, v.source, v.created) for v in reader.versions()] == [
        (1, "somewhere", 1.0), (2, "somewhere", 1.0),
    ]  # fmt: skip
    assert audit(reader) == {}


def test_adapters_of_the_first_format_are_refused(root: Path):
    first_format(root, attachment=b'{"type":"lora","targets":[]}')
    for writable in (False, True):
        with pytest.raises(DamagedCatalog, match="add its variants to a new zoo"):
            Catalog(root, writable=writable).variants()


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
