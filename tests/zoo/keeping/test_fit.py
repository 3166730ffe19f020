"""What fits into a memory follows from the catalog, and what is foretold is what happens."""

import json
import shutil
from pathlib import Path

import pytest

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import BadSource, UnsupportedOption
from zoo.keeping.aliases import pin
from zoo.keeping.census import census
from zoo.keeping.fit import Fit, Load, Prospect, Resident, fit
from zoo.keeping.prospect import prospect
from zoo.keeping.reach import Reach
from zoo.keeping.sizes import parsed_size, size
from zoo.manifest import ObjectDigest
from zoo.progress import Quiet

SIZES = {ObjectDigest(name): n for name, n in {"b": 100, "x": 7, "y": 9, "o": 50}.items()}


def resident(name: str, tensors: str, kv: int = 2) -> Resident:
    return Resident(name, frozenset(map(ObjectDigest, tensors)), kv)


RESIDENTS = [resident("tuned", "bxy"), resident("base", "b"), resident("lora", "bx", kv=1),
             resident("other", "o")]  # fmt: skip


def told(memory: int, sequences: int = 0, more: Prospect | None = None) -> Fit:
    return fit(RESIDENTS, SIZES, Load(memory, context=10, sequences=sequences), more)


def test_each_variant_adds_what_those_before_it_did_not_bring():
    found = told(1000)
    lines = [(row.name, row.adds_bytes, row.total_bytes, row.frees_bytes) for row in found.variants]
    assert lines == [
        ("other", 50, 50, 50),
        ("base", 100, 150, 0),
        ("lora", 7, 157, 0),
        ("tuned", 9, 166, 9),
    ]  # fmt: skip
    assert (found.fitting, found.weights_bytes, found.left_bytes) == (4, 166, 834)


@pytest.mark.parametrize(
    ("memory", "fitting", "left"), [(49, 0, 49), (50, 1, 0), (156, 2, 6), (157, 3, 0), (166, 4, 0)]
)
def test_it_fits_to_the_byte(memory: int, fitting: int, left: int):
    found = told(memory)
    assert (found.fitting, found.left_bytes) == (fitting, left)
    assert sum(row.fits for row in found.variants) == fitting


def test_keys_and_values_are_set_aside_first():
    found = told(166 + 3 * 20 + 5, sequences=2)
    assert (found.kv_bytes, found.fitting) == (40, 4)
    assert (found.left_bytes, found.more_sequences) == (25, 1)
    assert told(166 + 39, sequences=2).fitting == 3


def test_one_more_of_a_kind_fits_beside_all_others():
    assert (a := told(166 + 30, more=Prospect("lora:4", 8)).addition)
    assert (a.adds_bytes, a.fits) == (8, 3)
    assert (a := told(165, more=Prospect("lora:4", 1)).addition)
    assert a.fits == 0


def test_nothing_fits_into_an_empty_zoo(root: Path):
    there = census(root, 2)
    found = fit(there.residents, there.sizes, Load(10, 1, 1))
    assert (found.fitting, found.left_bytes, found.more_sequences) == (0, 10, 0)


def adds(root: Path, name: str) -> int:
    """What serving a variant takes beside the base."""
    catalog = Catalog(root)
    reach, sizes = Reach(catalog), catalog.objects()
    base = reach.footprint(catalog.variant("base")).tensors
    own = reach.footprint(catalog.variant(name)).tensors - base
    return sum(sizes[tensor].nbytes for tensor in own)


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_kind_would_add_is_what_it_adds(
    root: Path, tmp_path: Path, put: Adder, checkpoints: Path, family: str
):
    base = checkpoints / family
    put("base", base)
    targets = EVERY if family == "llama" else GPT2
    last = "layers.3." if family == "llama" else "h.3."
    norms = ["norm.weight"] if family == "llama" else ["ln_"]
    variants = {
        "lora:3": builders.tiny_lora(tmp_path / "lora", base, rank=3, targets=targets),
        "last:1": builders.fine_tune(tmp_path / "last", base, [last]),
        "full": builders.fine_tune(tmp_path / "full", base, [""]),
    }
    for kind, source in variants.items():
        before = prospect(root, kind, None, Quiet())
        from_source = prospect(root, str(source), None, Quiet())
        put("new", source, base="base", replace=True)
        assert before.own_bytes == from_source.own_bytes == adds(root, "new"), kind
        assert prospect(root, str(source), None, Quiet()).own_bytes == 0
    put("new", builders.fine_tune(tmp_path / "norm", base, norms), base="base", replace=True)
    norm = prospect(root, "norm", None, Quiet()).own_bytes
    assert norm == adds(root, "new")


@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        ("prefix:5", 5 * 4 * 2 * 32),
        ("prompt:7", 7 * 64),
        ("ia3", 4 * (2 * 32 + 112)),
        ("bias", 4 * (3 * 64 + 2 * 32 + 2 * 112)),
    ],
)
def test_small_kinds_are_weighed_on_the_bases_shapes(
    root: Path, put: Adder, checkpoints: Path, kind: str, elements: int
):
    put("base", checkpoints / "llama")
    assert Catalog(root).variant("base").hidden == 64
    assert prospect(root, kind, None, Quiet()).own_bytes == 4 * elements


def test_a_kind_needs_its_number_and_a_base(
    root: Path, put: Adder, checkpoints: Path, tmp_path: Path
):
    with pytest.raises(UnsupportedOption, match="upon which base"):
        prospect(root, "full", None, Quiet())
    put("base", checkpoints / "llama")
    put("gpt2", checkpoints / "gpt2")
    with pytest.raises(UnsupportedOption, match="one of base, gpt2"):
        prospect(root, "full", None, Quiet())
    for wrong in ("lora", "full:3"):
        with pytest.raises(UnsupportedOption, match="use one of full, delta"):
            prospect(root, wrong, "base", Quiet())
    with pytest.raises(BadSource, match=r"a source or a kind \(full"):
        prospect(root, "lore:16", "base", Quiet())


def test_an_alias_of_an_older_version_takes_room_of_its_own(
    root: Path, tmp_path: Path, put: Adder, checkpoints: Path
):
    put("base", checkpoints / "llama")
    pin(root, "stable", "base", wait_s=1, progress=Quiet())
    assert [one.name for one in census(root, 2).residents] == ["base"]
    tuned = builders.fine_tune(tmp_path / "tuned", checkpoints / "llama", ["lm_head"])
    put("base", tuned, replace=True)
    there = census(root, 4)
    assert sorted(one.name for one in there.residents) == ["base", "stable"]
    found = fit(there.residents, there.sizes, Load(10**9, there.context, 2))
    assert found.variants[1].adds_bytes == 4 * 320 * 64
    # Keys and values of 4 layers, 256 positions, 2 KV heads' worth per the checkpoint's config.
    config = json.loads((checkpoints / "llama" / "config.json").read_text())
    width = config["num_key_value_heads"] * (64 // config["num_attention_heads"])
    assert found.kv_bytes == 2 * 256 * 4 * 2 * width * 4
    shutil.rmtree(root / "objects")
    assert census(root, 4) == there, "the catalog alone answers"


@pytest.mark.parametrize(
    ("text", "bytes"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 << 30), ("1.5M", 1_500_000), ("123", 123), ("2k", 2000)],
)
def test_sizes_are_read(text: str, bytes: int):
    assert parsed_size(text) == bytes


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "1e9", "80GBs", "1iB", "9999999P", "1 0 GB"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(UnsupportedOption):
        parsed_size(text)


def test_sizes_are_shown_in_decimal_units():
    assert [size(n) for n in (5, 1500, 2_000_000, 3 * 10**12)] == [
        "5 B", "1.5 kB", "2.0 MB", "3.0 TB",
    ]  # fmt: skip
