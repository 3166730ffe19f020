"""Variants move between zoos: only what is missing, checked on arrival, the catalog last."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import msgspec
import pytest

from tests import builders
from tests.zoo.conftest import Adder
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.errors import BadDelivery, BadSource, DamagedCatalog, NameTaken, UnknownVariant, ZooError
from zoo.export import export
from zoo.keeping.verify import verify
from zoo.manifest import LowRank, ObjectDigest, digest
from zoo.progress import Quiet
from zoo.store import Store
from zoo.transfer.depot import Depot
from zoo.transfer.move import Move, Moved, pull, push
from zoo.transfer.shipment import Shipment

MEMORY = "memory://depot"


@pytest.fixture(scope="module")
def made(checkpoints: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a base, an adapter and a fine-tune that is kept as differences."""
    folder = tmp_path_factory.mktemp("made")
    full = builders.fine_tune(folder / "f", checkpoints / "llama", [""], scale=1e-4)
    for name, source in {"base": checkpoints / "llama", "tuned": adapter, "full": full}.items():
        base = None if name == "base" else "base"
        add(folder / "zoo", name, str(source), AddOptions(base=base), Quiet())
    return folder / "zoo"


@pytest.fixture
def source(made: Path, root: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made, root))


@pytest.fixture(scope="module")
def content(made: Path) -> dict[str, bytes]:
    """The files of a depot that the zoo was pushed to."""
    pushed(made, MEMORY)
    system = fsspec.filesystem("memory")
    return {name: system.cat_file(name) for name in system.find("/depot")}


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty depot in this process's memory."""
    system = fsspec.filesystem("memory")
    if system.exists("/depot"):
        system.rm("/depot", recursive=True)
    yield MEMORY
    if system.exists("/depot"):
        system.rm("/depot", recursive=True)


@pytest.fixture
def depot(content: dict[str, bytes], memory: str) -> str:
    """A depot that the zoo was pushed to, and that a test may change."""
    for name, data in content.items():
        fsspec.filesystem("memory").pipe_file(name, data)
    return memory


@pytest.fixture(params=["folder", "memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """Where a zoo is pushed to: of each kind one."""
    return {
        "folder": str(tmp_path / "other"),
        "memory": memory,
        "file": (tmp_path / "depot").as_uri(),
    }[request.param]


def pulled(root: Path, place: str, *names: str, replace: bool = False) -> Moved:
    return pull(root, place, Move(names, replace, 1.0), Quiet())


def pushed(root: Path, place: str, *names: str, replace: bool = False) -> Moved:
    return push(root, place, Move(names, replace, 1.0), Quiet())


def assert_equal_zoos(left: Path, right: Path) -> None:
    ours, theirs = Catalog(left), Catalog(right)
    assert ours.variants() == theirs.variants()
    assert ours.objects() == theirs.objects()
    assert set(Store(left).digests()) == set(Store(right).digests())
    assert Store(left).disk_bytes() == Store(right).disk_bytes()
    assert verify(right, Quiet()).damages == []
    assert Store(right).leftovers() == []


def test_a_zoo_goes_there_and_comes_back(source: Path, place: str, tmp_path: Path):
    sent = pushed(source, place)
    assert sent.names == ["base", "full", "tuned"]
    assert sent.objects == len(list(Store(source).digests()))
    assert any(Store(source).parent(each) for each in Store(source).digests())
    home = tmp_path / "home"
    assert pulled(home, place) == sent
    assert_equal_zoos(source, home)
    again = pulled(home, place)
    assert (again.names, again.known, again.objects, again.bytes) == ([], sent.names, 0, 0)
    assert again.needed_bytes == sent.needed_bytes


def test_only_what_is_unknown_travels(source: Path, place: str, tmp_path: Path):
    pushed(source, place, "base")
    more = pushed(source, place, "tuned")
    own = Catalog(source).variant("tuned")
    assert more.objects == len({*own.tensors.values(), own.files["adapter_config.json"],
                                own.files["README.md"]})  # fmt: skip
    home = tmp_path / "home"
    pulled(home, place, "tuned")
    assert [variant.name for variant in Catalog(home).variants()] == ["tuned"]
    assert verify(home, Quiet()).damages == []
    assert pulled(home, place, "base").objects < 5


def test_what_was_broken_off_goes_on_where_it_stopped(source: Path, place: str, tmp_path: Path):
    class Stopped(Exception):
        pass

    class Stops(Quiet):
        def track(self, items, label):
            yield from items[:5]
            raise Stopped

    pushed(source, place)
    home = tmp_path / "home"
    with pytest.raises(Stopped):
        pull(home, place, Move(("base",)), Stops())
    assert Catalog(home).variants() == []
    everything = pushed(source, str(tmp_path / "measure"), "base").objects
    assert pulled(home, place, "base").objects == everything - 5
    assert verify(home, Quiet()).damages == []


def test_a_name_that_means_something_else_there_is_kept_unless_told(
    source: Path, place: str, put: Adder, checkpoints: Path, tmp_path: Path
):
    pushed(source, place)
    put("base", checkpoints / "qwen2", replace=True)
    with pytest.raises(NameTaken, match="--replace"):
        pushed(source, place, "base")
    pushed(source, place, "base", replace=True)
    home = tmp_path / "home"
    pulled(home, place, "base")
    assert Catalog(home).variant("base").family == "qwen2"


def test_an_older_version_travels_under_its_name(
    source: Path, place: str, put: Adder, checkpoints: Path, tmp_path: Path
):
    first = Catalog(source).variant("base")
    put("base", checkpoints / "qwen2", replace=True)
    pushed(source, place, "base@1")
    pulled(tmp_path / "home", place, "base")
    assert Catalog(tmp_path / "home").variant("base") == first


def test_what_arrived_exports_as_what_was_added(source: Path, memory: str, tmp_path: Path):
    pushed(source, memory)
    pulled(tmp_path / "home", memory)
    for name in ("base", "full", "tuned"):
        ours = export(source, name, tmp_path / f"{name}-1", Quiet())
        theirs = export(tmp_path / "home", name, tmp_path / f"{name}-2", Quiet())
        for path in ours.iterdir():
            assert path.read_bytes() == (theirs / path.name).read_bytes()


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("no/such/folder", BadSource, "is no zoo's folder"),
        ("warp://depot", BadSource, "warp://depot cannot be reached"),
        ("memory://nothing", UnknownVariant, "has no variant 'base': there is nothing"),
        ("file:///proc/1/nothing", UnknownVariant, "has no variant 'base'"),
    ],
)
def test_a_place_that_is_no_zoo_is_named(root: Path, place: str, error: type, message: str):
    with pytest.raises(error, match=message):
        pulled(root, place, "base")
    assert not root.exists()


# ---- what others send is not believed -----------------------------------------------------------

Edit = Callable[[dict], object]


def record(name: str = "base") -> dict:
    return msgspec.json.decode(fsspec.filesystem("memory").cat_file(f"/depot/variants/{name}.json"))


def rewrite(changed: dict, name: str = "base") -> None:
    fsspec.filesystem("memory").pipe_file(
        f"/depot/variants/{name}.json", msgspec.json.encode(changed)
    )


def sealed(changed: dict) -> dict:
    """The record with the digests that its manifests have now, so that only the lie is left."""
    shipment = msgspec.convert(changed, Shipment)
    publication = shipment.publication
    renamed = {old: digest(unit) for old, unit in publication.units.items()}
    pieces = {old: digest(one) for old, one in publication.attachments.items()}
    chain = msgspec.structs.replace(
        publication.chain,
        units=tuple(renamed[unit] for unit in publication.chain.units),
        attachments=tuple(d and pieces[d] for d in publication.chain.attachments),
    )
    publication = msgspec.structs.replace(
        publication,
        chain=chain,
        units={renamed[old]: unit for old, unit in publication.units.items()},
        attachments={pieces[old]: one for old, one in publication.attachments.items()},
        variant=msgspec.structs.replace(publication.variant, chain=digest(chain)),
    )
    return msgspec.to_builtins(msgspec.structs.replace(shipment, publication=publication))


def refuses(home: Path, place: str, message: str, name: str = "base") -> None:
    with pytest.raises(ZooError, match=message) as caught:
        pulled(home, place, name)
    assert "\n" not in str(caught.value)
    assert Catalog(home).variants() == []


def of(changed: dict) -> dict:
    return changed["publication"]["variant"]


def first_unit(changed: dict) -> dict:
    publication = changed["publication"]
    return publication["units"][publication["chain"]["units"][1]]


def any_object(changed: dict) -> dict:
    objects = changed["publication"]["objects"]
    return objects[max(objects, key=lambda key: objects[key]["nbytes"])]


PLAIN: list[tuple[Edit, str]] = [
    (lambda r: of(r).update(name="../evil"), "'../evil' is not a name"),
    (lambda r: of(r).update(name="other"), "'base' was asked for and 'other' came"),
    (lambda r: of(r).update(chain="0" * 64), "is not what its digest says"),
    (lambda r: of(r)["files"].update({"../../x.json": "0" * 64}), "no plain file name"),
    (lambda r: of(r)["files"].update({"x.json": "../" * 20}), "its objects are not those"),
    (lambda r: of(r)["tensors"].update(w="0" * 64), "its objects are not those"),
    (lambda r: of(r).update(report={}), "report does not say"),
    (lambda r: of(r).update(context=10**12), "cannot be"),
    (lambda r: of(r).update(eos=[10**6]), "ends at a token"),
    (lambda r: of(r).update(hidden=63), "differ in width"),
    (lambda r: of(r).update(borrowed=["gone.json"]), "does not have"),
    (lambda r: of(r).update(surprise=1), "is broken"),
    (lambda r: of(r).update(kind=7), "is broken"),
    (lambda r: r["publication"]["chain"]["units"].pop(), "has 9 units|not those"),
    (lambda r: r["publication"]["units"].popitem(), "not those that its chain names"),
    (lambda r: r["publication"]["objects"].popitem(), "objects are not those"),
    (lambda r: any_object(r).update(nbytes=10**15), "is said to have"),
    (lambda r: any_object(r).update(dtype="Q9"), "'Q9' is unknown"),
    (lambda r: any_object(r).update(shape=[-1, 2]), "negative"),
    (lambda r: any_object(r).update(dtype="BLOB"), "is said to be a BLOB"),
    (lambda r: r["parents"].update({"0" * 64: "1" * 64}), "cannot be a difference"),
    (
        lambda r: r["parents"].update({next(iter(of(r)["tensors"].values())): "../etc"}),
        "not a digest",
    ),
]
SEALED: list[tuple[Edit, str]] = [
    (lambda r: first_unit(r)["tensors"].update(magic=first_unit(r)["tensors"]["q.weight"]),
     "a tensor 'magic', which it cannot have"),
    (lambda r: (t := first_unit(r)["tensors"]).update({"q.weight": t["norm.weight"]}),
     r"q.weight is F32 \[64\] instead of \[64, 64\]"),
    (lambda r: first_unit(r)["spec"].update(head_dim=10**9), "instead of"),
    (lambda r: r["publication"]["chain"].update(
        units=r["publication"]["chain"]["units"][::-1]), "from an embedding to a head"),
    (lambda r: r["publication"]["chain"].update(
        units=[r["publication"]["chain"]["units"][0]] * 10), "not those that its chain names"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), PLAIN)
def test_a_record_that_lies_is_refused(depot: str, tmp_path: Path, edit: Edit, message: str):
    changed = record()
    edit(changed)
    rewrite(changed)
    refuses(tmp_path / "home", depot, message)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("edit", "message"), SEALED)
def test_manifests_that_no_worker_could_compute_are_refused(
    depot: str, tmp_path: Path, edit: Edit, message: str
):
    changed = record()
    edit(changed)
    rewrite(sealed(changed))
    refuses(tmp_path / "home", depot, message)
    assert not (tmp_path / "home").exists()


def test_an_attachment_of_another_shape_is_refused(depot: str, tmp_path: Path):
    changed = record("tuned")
    attachment = next(iter(changed["publication"]["attachments"].values()))
    piece = attachment["pieces"][0]
    assert msgspec.convert(piece, LowRank)
    piece["a"], piece["b"] = piece["b"], piece["a"]
    rewrite(sealed(changed), "tuned")
    refuses(tmp_path / "home", depot, "LowRank is F32", "tuned")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 200_000, b"null"])
def test_a_record_that_is_none_is_refused(root: Path, memory: str, data: bytes):
    fsspec.filesystem("memory").pipe_file("/depot/variants/base.json", data)
    refuses(root, memory, "the record of 'base' .* is broken")


@pytest.mark.parametrize("suffix", [".safetensors", ".difference", ".blob"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "other", "huge", "gone", "empty"])
def test_an_object_that_is_not_what_was_promised_is_not_taken(
    depot: str, tmp_path: Path, suffix: str, damage: str
):
    system = fsspec.filesystem("memory")
    places = sorted(p for p in system.find("/depot/objects") if p.endswith(suffix))
    victim, other = places[:2]
    content = bytearray(system.cat_file(victim))
    match damage:
        case "flipped":
            content[-1] ^= 1
        case "cut":
            content = content[: len(content) // 2]
        case "longer":
            content += b"x"
        case "other":
            content = system.cat_file(other)
        case "huge":
            content = bytes(len(content) * 2 + (1 << 20))
        case "empty":
            content = b""
        case _:
            assert damage == "gone"
    system.rm(victim)
    if damage != "gone":
        system.pipe_file(victim, bytes(content))
    home = tmp_path / "home"
    with pytest.raises(ZooError) as caught:
        pulled(home, depot)
    assert isinstance(caught.value, BadDelivery)
    assert "\n" not in str(caught.value)
    stem = ObjectDigest(victim.rpartition("/")[2].partition(".")[0])
    assert not Store(home).has(stem)
    assert verify(home, Quiet()).damages == []
    assert Store(home).leftovers() == []


def test_a_folder_with_a_catalog_that_does_more_than_hold_tables_is_refused(
    source: Path, tmp_path: Path
):
    writer = Catalog(source, writable=True)
    with writer.database.transaction() as connection:
        connection.execute("ALTER TABLE variants RENAME TO real")
        connection.execute("CREATE VIEW variants AS SELECT * FROM real")
    writer.close()
    with pytest.raises(DamagedCatalog, match="'variants', which is no table"):
        pulled(tmp_path / "home", str(source))


def test_a_depot_lists_only_what_it_can_name(root: Path, memory: str):
    system = fsspec.filesystem("memory")
    system.pipe_file("/depot/variants/a%2F..%2Fb.json", b"{}")
    assert Depot(memory, root).names() == ["a/../b"]
    refuses(root, memory, "is broken", "a/../b")
