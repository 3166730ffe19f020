"""Writing a variant back as what it came from: a folder that transformers or peft loads, bit-equal.

The folder is made beside its final place and renamed once it is whole.
"""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

import msgspec

from zoo.catalog import Catalog
from zoo.errors import BadName, BadSource, DiskFull, StoreFailure
from zoo.manifest import ObjectDigest, Variant
from zoo.progress import Progress
from zoo.store import NO_ROOM, Store
from zoo.tensorfile import ALIGNMENT, ITEM_BYTES, Entry


def export(root: Path, name: str, target: Path, progress: Progress) -> Path:
    """Write the variant to the folder `target`, which must be absent or empty; returns it."""
    with contextlib.closing(Catalog(root)) as catalog:
        variant = catalog.variant(name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadSource(f"{target} exists already and is not empty: give a folder that does not")
    target = target.absolute()
    draft = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        _write_files(Store(root), variant, draft)
        stem = "adapter_model" if variant.kind == "lora" else "model"
        _write_tensors(Store(root), variant.tensors, draft / f"{stem}.safetensors", progress)
        if target.exists():
            target.rmdir()
        draft.rename(target)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"there is no room left for {target}: free some space") from error
        raise StoreFailure(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write_files(store: Store, variant: Variant, folder: Path) -> None:
    for name, digest in variant.files.items():
        if name in variant.borrowed:
            continue
        if Path(name).name != name:
            raise BadName(f"the catalog names a file {name!r}, which is not a plain file name")
        (folder / name).write_bytes(store.blob(digest))


def _write_tensors(
    store: Store, tensors: dict[str, ObjectDigest], path: Path, progress: Progress
) -> None:
    """One safetensors file; wide elements first, so that every tensor is aligned to its own."""
    infos = {name: store.info(digest) for name, digest in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[infos[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        info = infos[name]
        header[name] = Entry(info.dtype, info.shape, (position, position + info.nbytes))
        position += info.nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in progress.track(order, "exporting"):
            store.verify(tensors[name])
            file.write(store.tensor(tensors[name]).data)
        file.flush()
        os.fsync(file.fileno())
