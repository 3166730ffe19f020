"""Objects are named by content, written whole, and never believed unchecked."""

import errno
import os
import resource
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import (
    BadName,
    BadTensorFile,
    DamagedObject,
    DiskFull,
    MissingObject,
    StoreFailure,
)
from zoo.manifest import ObjectDigest
from zoo.store import Store

DATA = struct.pack("<6f", *range(6))


def test_a_tensor_comes_back_aligned_and_read_only(root: Path):
    store = Store(root)
    digest = store.put_tensor("F32", (2, 3), DATA)
    stored = store.tensor(digest)
    assert (stored.dtype, stored.shape, bytes(stored.data)) == ("F32", (2, 3), DATA)
    assert stored.data.readonly
    assert np.frombuffer(stored.data, np.uint8).ctypes.data % 64 == 0
    assert store.path(digest) == root / "objects" / digest[:2] / digest[2:4] / (
        digest + ".safetensors"
    )
    assert store.path(digest).stat().st_mode & 0o222 == 0


def test_safetensors_reads_an_object(root: Path):
    from safetensors.numpy import load_file

    store = Store(root)
    digest = store.put_tensor("F32", (2, 3), DATA)
    (name, array), *rest = load_file(store.path(digest)).items()
    assert (name, array.tobytes(), rest) == ("tensor", DATA, [])


def test_the_digest_covers_dtype_shape_and_bytes(root: Path):
    store = Store(root)
    digests = {
        store.put_tensor("F32", (6,), DATA),
        store.put_tensor("F32", (2, 3), DATA),
        store.put_tensor("I32", (6,), DATA),
        store.put_tensor("F32", (6,), DATA[::-1]),
        store.put_blob(DATA),
    }
    assert len(digests) == 5
    assert set(store.digests()) == digests


def test_equal_tensors_are_kept_once(root: Path):
    store = Store(root)
    first, second = store.put_tensor("F32", (6,), DATA), store.put_tensor("F32", (6,), DATA)
    assert first == second
    assert len(list(store.digests())) == 1


def test_blobs_and_empty_tensors_are_objects_too(root: Path):
    store = Store(root)
    assert store.blob(store.put_blob(b"")) == b""
    digest = store.put_tensor("F32", (0, 4), b"")
    assert store.tensor(digest).shape == (0, 4)
    assert store.info(digest).nbytes == 0
    assert store.info(store.put_blob(b"abc")).shape == (3,)


@pytest.mark.parametrize("name", ["", "ab", "A" * 64, "../" + "a" * 61, "g" * 64, "a" * 65])
def test_only_digests_become_file_names(root: Path, name: str):
    with pytest.raises(BadName):
        Store(root).path(ObjectDigest(name))


def test_bytes_must_fit_the_shape(root: Path):
    with pytest.raises(BadTensorFile, match="24 bytes do not make"):
        Store(root).put_tensor("F32", (7,), DATA)


def test_a_missing_object_is_named(root: Path):
    with pytest.raises(MissingObject, match="a" * 64):
        Store(root).tensor(ObjectDigest("a" * 64))


def test_a_flipped_bit_is_found_and_healed_by_writing_again(root: Path):
    store = Store(root)
    digest, blob = store.put_tensor("F32", (2, 3), DATA), store.put_blob(b"hello")
    for each in (digest, blob):
        path = store.path(each)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(content)
        with pytest.raises(DamagedObject):
            store.verify(each)
    store.put_tensor("F32", (2, 3), DATA)
    store.put_blob(b"hello")
    store.verify(digest)
    store.verify(blob)


def test_a_truncated_object_is_refused_when_it_is_opened(root: Path):
    store = Store(root)
    path = store.path(store.put_tensor("F32", (2, 3), DATA))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedObject):
        store.tensor(ObjectDigest(path.stem))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DiskFull, match="no room"):
            store.put_tensor("F32", (6,), DATA)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_file_size_limit_is_met_in_the_middle_of_a_write(root: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull):
            Store(root).put_tensor("U8", (4 << 20,), bytes(4 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailure, match="cannot be written"):
        Store(tmp_path / "file").put_blob(b"abc")


def test_what_was_written_can_be_taken_back_but_not_what_was_there(root: Path):
    kept = Store(root).put_tensor("F32", (6,), DATA)
    store = Store(root)
    store.put_tensor("F32", (6,), DATA)
    store.put_blob(b"new")
    store.take_back()
    assert list(store.digests()) == [kept]


def test_many_mappings_need_no_file_descriptors(root: Path):
    store = Store(root)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    kept = [store.tensor(store.put_tensor("U8", (1,), bytes([i]))) for i in range(100)]
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after - before < 10
    assert [stored.data[0] for stored in kept] == list(range(100))


def test_threads_that_write_the_same_object_at_once_agree(root: Path):
    results: list[str] = []
    start = threading.Barrier(8)

    def write() -> None:
        start.wait()
        results.extend(Store(root).put_tensor("U8", (1000,), bytes([i]) * 1000) for i in range(10))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert len(set(results)) == 10
    assert Store(root).leftovers() == []
    for digest in set(results):
        Store(root).verify(ObjectDigest(digest))
