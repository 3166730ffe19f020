"""Writing a variant back as what it came from: a folder that transformers, peft or the `adapters`
library loads, bit-equal; a sum of adapters as one LoRA of peft; what is stored approximately as it
is served.

The folder is made beside its final place and renamed once it is whole.
"""

import contextlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from zoo.adapters.adapter import CONFIG_NAME, HEAD_STEM, LIBRARY_STEM, STEM
from zoo.adapters.summed import lora_of
from zoo.adding.weighted import KIND as SUM
from zoo.catalog import Catalog
from zoo.dummy.refusal import check_weights
from zoo.errors import BadName, BadSource, DiskFull, StoreFailure, UnsupportedOption
from zoo.families.registry import family_named
from zoo.manifest import Variant
from zoo.progress import Progress
from zoo.sources.weights import SourceTensor
from zoo.sources.writer import write_tensors
from zoo.store import NO_ROOM, Store


def export(root: Path, name: str, target: Path, progress: Progress) -> Path:
    """Write the variant to the folder `target`, which must be absent or empty; returns it."""
    store = Store(root)
    with contextlib.closing(Catalog(root)) as catalog:
        variant = catalog.variant(name)
        check_weights([variant], "exported")
        files = _made_files(catalog, store, variant, progress)
    if not files and not variant.tensors:
        raise UnsupportedOption(
            f"{name} has a shape that no config of {variant.family} can say: it is served only"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadSource(f"{target} exists already and is not empty: give a folder that does not")
    target = target.absolute()
    draft = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        _write_files(store, variant, draft)
        for stem, tensors in (files or _files(store, variant, progress)).items():
            write_tensors(draft / f"{stem}.safetensors", tensors, progress)
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


def _files(
    store: Store, variant: Variant, progress: Progress
) -> Mapping[str, Mapping[str, SourceTensor]]:
    """The weights' files by their stem, every tensor hashed again. A library's saved head has a
    file of its own."""
    files: dict[str, dict[str, SourceTensor]] = {_stem(store, variant): {}}
    (main,) = files
    for name, digest in progress.track(list(variant.tensors.items()), "verifying"):
        store.verify(digest)
        stored = store.tensor(digest)
        head, _, short = name.rpartition(f"{HEAD_STEM}/")
        apart = short != name and not head
        files.setdefault(HEAD_STEM if apart else main, {})[short if apart else name] = SourceTensor(
            stored.dtype, stored.shape, stored.data
        )
    return files


def _stem(store: Store, variant: Variant) -> str:
    """What the source's weights were called."""
    config = variant.files.get(CONFIG_NAME)
    if config is None:
        return "model"
    is_peft = "peft_type" in msgspec.json.decode(store.blob(config), type=dict)
    return STEM if is_peft else LIBRARY_STEM


def _made_files(
    catalog: Catalog, store: Store, variant: Variant, progress: Progress
) -> Mapping[str, Mapping[str, SourceTensor]] | None:
    """Weights' files that are made anew, where those of the source are not what is served."""
    if variant.kind == SUM:
        return _sum_files(catalog, store, variant)
    if variant.store == "delta":
        # Merging brings torch along.
        from zoo.deltas.merge import merged_tensors

        return {"model": merged_tensors(catalog, store, variant, progress)}
    return None


def _sum_files(
    catalog: Catalog, store: Store, variant: Variant
) -> Mapping[str, Mapping[str, SourceTensor]]:
    chain = catalog.chain(variant.chain)
    units = [catalog.unit(digest) for digest in chain.units]
    attachments = [
        None if digest is None else catalog.attachment(digest) for digest in chain.attachments
    ]
    return {STEM: lora_of(store, family_named(variant.family), units, attachments)[1]}
