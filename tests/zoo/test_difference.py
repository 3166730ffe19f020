"""Tensors kept as lossless differences: every bit comes back, whatever the bits are."""

from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.torch import load_file

from tests import builders
from tests.zoo.conftest import Adder
from zoo import difference
from zoo.catalog import Catalog
from zoo.difference import Head, decode, encode, read_head
from zoo.errors import BadTensorFile, DamagedObject, MissingObject
from zoo.export import export
from zoo.manifest import ObjectDigest
from zoo.progress import Quiet
from zoo.store import Store

ITEMS = 3 * 1024
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def child_of(parent: bytes, seed: int = 1) -> bytes:
    """The same 16-bit floats, most of them some units in the last place away."""
    steps = np.random.default_rng(seed).integers(-3, 4, len(parent) // 2, dtype=np.int16)
    return (np.frombuffer(parent, np.uint16) + steps.view(np.uint16)).tobytes()


def weights(items: int = 16 * ITEMS, seed: int = 0) -> bytes:
    """Random weights in bfloat16, none so small that a step would change its sign."""
    values = np.random.default_rng(seed).normal(size=items).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def pair(store: Store) -> tuple[ObjectDigest, ObjectDigest, bytes]:
    """A parent, its child that is kept as a difference, and the child's bytes."""
    shape = (16, ITEMS)
    parent = store.put_tensor("BF16", shape, weights())
    data = child_of(weights())
    return parent, store.put_tensor("BF16", shape, data, parent), data


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", sorted(KINDS))
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_any_bits_come_back(dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(difference, "CHUNK_ITEMS", chunk)
    count = 50 if chunk == 1 else 2500
    raw = np.random.default_rng(3).bytes(2 * count * np.dtype(KINDS[dtype]).itemsize)
    parent, data = memoryview(raw)[: len(raw) // 2], memoryview(raw)[len(raw) // 2 :]
    head = Head(ObjectDigest("a" * 64), dtype, (count,))
    read, frames = read_head(memoryview(b"".join(encode(head, parent, data))))
    assert read == head
    assert b"".join(decode(read, frames, parent)) == data


def test_zeros_of_both_signs_infinities_and_nans_come_back():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45], np.float32).tobytes()
    for other in (special, special[::-1], bytes(len(special))):
        head = Head(ObjectDigest("a" * 64), "F32", (7,))
        content = memoryview(b"".join(encode(head, memoryview(other), memoryview(special))))
        assert b"".join(decode(head, read_head(content)[1], memoryview(other))) == special


def test_a_fine_tune_takes_a_fraction_of_its_bytes(root: Path):
    store = Store(root)
    parent, child, data = pair(store)
    assert store.parent(child) == parent
    assert store.parent(parent) is None
    assert store.path(child).stat().st_size < 0.25 * len(data)
    stored = store.tensor(child)
    assert (stored.dtype, stored.shape, bytes(stored.data)) == ("BF16", (16, ITEMS), data)
    assert store.info(child).nbytes == len(data)
    assert store.info(child).shape == (16, ITEMS)
    store.verify(child)
    assert set(store.digests()) == {parent, child}


def test_the_digest_is_that_of_the_whole_tensor(root: Path, tmp_path: Path):
    _, child, data = pair(Store(root))
    assert child == Store(tmp_path / "other").put_tensor("BF16", (16, ITEMS), data)


def test_a_difference_to_a_difference_is_one_to_its_parent(root: Path):
    store = Store(root)
    parent, child, data = pair(store)
    grandchild = store.put_tensor("BF16", (16, ITEMS), child_of(data, seed=2), child)
    assert store.parent(grandchild) == parent


@pytest.mark.parametrize("case", ["unrelated", "small", "shape", "dtype", "integers"])
def test_what_saves_too_little_or_cannot_be_compared_is_kept_whole(root: Path, case: str):
    store = Store(root)
    parent = store.put_tensor("BF16", (16, ITEMS), weights())
    data, shape, dtype = child_of(weights()), (16, ITEMS), "BF16"
    if case == "unrelated":
        data = np.random.default_rng(9).bytes(len(data))
    elif case == "small":
        parent, data, shape = store.put_tensor("BF16", (4,), data[:8]), data[8:16], (4,)
    elif case == "shape":
        shape = (ITEMS, 16)
    elif case == "dtype":
        dtype = "F16"
    else:
        dtype = "I16"
        parent = store.put_tensor(dtype, shape, weights())
    child = store.put_tensor(dtype, shape, data, parent)
    assert store.parent(child) is None
    assert store.tensor(child).data.readonly
    assert bytes(store.tensor(child).data) == data


def test_what_lies_there_whole_stays_whole(root: Path):
    store = Store(root)
    parent = store.put_tensor("BF16", (16, ITEMS), weights())
    child = store.put_tensor("BF16", (16, ITEMS), child_of(weights()))
    assert store.put_tensor("BF16", (16, ITEMS), child_of(weights()), parent) == child
    assert store.parent(child) is None


@pytest.mark.parametrize("part", ["head", "frame", "end", "more", "parent"])
def test_damage_is_found_and_healed_by_writing_again(root: Path, part: str):
    store = Store(root)
    parent, child, data = pair(store)
    content = bytearray(store.path(child).read_bytes())
    if part == "parent":
        flipped = bytearray(store.path(parent).read_bytes())
        flipped[-1] ^= 1
        rewrite(store.path(parent), bytes(flipped))
    elif part == "end":
        rewrite(store.path(child), bytes(content[:-3]))
    elif part == "more":
        rewrite(store.path(child), bytes(content) + b"more")
    else:
        content[4 if part == "head" else len(content) // 2] ^= 0x55
        rewrite(store.path(child), bytes(content))
    with pytest.raises(DamagedObject, match=child):
        store.verify(child)
    assert store.put_tensor("BF16", (16, ITEMS), data) == child
    store.verify(child)
    assert store.delete(child) > len(data)
    assert not store.has(child)


def test_without_its_parent_it_says_which_object_is_missing(root: Path):
    store = Store(root)
    parent, child, _ = pair(store)
    store.delete(parent)
    with pytest.raises(MissingObject, match=parent):
        store.tensor(child)


def test_a_frame_that_would_fill_the_memory_is_refused_by_its_size():
    head = Head(ObjectDigest("a" * 64), "BF16", (4,))
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    frames = memoryview(len(bomb).to_bytes(4, "little") + bomb)
    with pytest.raises(BadTensorFile, match="size of its parent"):
        list(decode(head, frames, memoryview(bytes(8))))


def test_a_full_fine_tune_is_kept_as_differences_and_exports_bit_equal(
    root: Path, put: Adder, tmp_path: Path
):
    base = builders.tiny_llama(tmp_path / "base", dtype="bfloat16", hidden_size=128)
    tuned = builders.fine_tune(tmp_path / "tuned", base, ["weight"], scale=1e-4)
    put("base", base)
    variant = put("tuned", tuned, base="base")
    store, catalog = Store(root), Catalog(root)
    parents = [digest for digest in variant.tensors.values() if store.parent(digest)]
    assert len(parents) > 20
    assert {store.parent(digest) for digest in parents} <= set(
        catalog.variant("base").tensors.values()
    )
    written = export(root, "tuned", tmp_path / "out", Quiet())
    before, after = (load_file(path / "model.safetensors") for path in (tuned, written))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
