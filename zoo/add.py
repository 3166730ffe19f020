"""Adding a variant: read the source, find what is shared with the base, write objects, publish.

The source is read and checked before the lock is taken; objects are written before the catalog
names them; what was written is taken back if anything fails on the way.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from zoo.adapters import Adapter, fit
from zoo.bases import base_of_adapter, closest, told_base
from zoo.catalog import Catalog, Publication, name_taken
from zoo.checkpoint import Checkpoint, sort_units
from zoo.compose import (
    Stored,
    Tuned,
    compose_adapter,
    compose_checkpoint,
    compose_tuned,
    compose_units,
    ground_of,
    publication_of,
    unit_digest,
)
from zoo.errors import BadName, UnknownVariant, UnsupportedOption
from zoo.gguf import DTYPES
from zoo.lock import writing
from zoo.manifest import Variant
from zoo.progress import Progress
from zoo.source import read_source
from zoo.store import Store
from zoo.weights import check_finite

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add: `dtype` is what a `.gguf` is stored as, `wait_s` how long the lock may take."""

    base: str | None = None
    store: str = "exact"
    min_agreement: float | None = None
    replace: bool = False
    dtype: str = "float32"
    wait_s: float = 600.0


def add(root: Path, name: str, source: str, options: AddOptions, progress: Progress) -> Variant:
    """Add the variant `name` from `source` to the zoo at `root`; raises a ZooError and leaves
    nothing."""
    _check(name, options)
    reader = Catalog(root)
    _check_free(reader, name, options)
    if options.base is not None:
        reader.variant(options.base)
    reader.close()
    origin = read_source(source, options.dtype)
    for tensor in progress.track(list(origin.tensors), f"checking {name}"):
        check_finite(origin.source, tensor, origin.tensors[tensor])
    with writing(root, options.wait_s, progress.say):
        catalog = Catalog(root, writable=True)
        store = Store(root)
        try:
            _check_free(catalog, name, options)
            publication = _prepare((catalog, store), name, origin, options, progress)
            store.settle()
            catalog.publish(publication, replace=options.replace)
        except BaseException:
            store.take_back()
            raise
        finally:
            catalog.close()
    return publication.variant


def _check(name: str, options: AddOptions) -> None:
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{name!r} is not a name for a variant: use up to 128 letters, digits and . _ : / - "
            "that start with a letter or a digit"
        )
    if options.store not in {"exact", "delta", "equivalent"}:
        raise UnsupportedOption(f"--store {options.store!r} is unknown: it is exact")
    if options.min_agreement is not None and options.store != "equivalent":
        raise UnsupportedOption("--min-agreement is only valid with --store equivalent")
    if options.store != "exact":
        raise UnsupportedOption(
            f"--store {options.store} is not available in this version: use --store exact"
        )
    if options.dtype not in DTYPES:
        raise UnsupportedOption(f"--dtype {options.dtype!r} is unknown: use {', '.join(DTYPES)}")


def _check_free(catalog: Catalog, name: str, options: AddOptions) -> None:
    if options.replace:
        return
    try:
        catalog.variant(name)
    except UnknownVariant:
        return
    raise name_taken(name)


def _prepare(
    zoo: tuple[Catalog, Store],
    name: str,
    origin: Checkpoint | Adapter,
    options: AddOptions,
    progress: Progress,
) -> Publication:
    """Place everything, then write it, then compose what the catalog has to know."""
    if isinstance(origin, Adapter):
        return _prepare_adapter(zoo, name, origin, options.base, progress)
    return _prepare_checkpoint(zoo, name, origin, options.base, progress)


def _prepare_checkpoint(
    zoo: tuple[Catalog, Store],
    name: str,
    checkpoint: Checkpoint,
    told: str | None,
    progress: Progress,
) -> Publication:
    catalog, store = zoo
    sources = sort_units(checkpoint)
    stored = _write(store, name, checkpoint, progress)
    units = compose_units(sources, stored.tensors)
    if told is not None:
        base = told_base(catalog, told)
    else:
        base = closest(catalog, [unit_digest(unit) for unit in units], name)
    variant, chain = compose_checkpoint(catalog, checkpoint, units, stored, base)
    return publication_of(store, variant, chain, Tuned(units, []))


def _prepare_adapter(
    zoo: tuple[Catalog, Store],
    name: str,
    adapter: Adapter,
    told: str | None,
    progress: Progress,
) -> Publication:
    catalog, store = zoo
    base = base_of_adapter(catalog, adapter, told)
    base_units = [catalog.unit(unit) for unit in catalog.chain(base.chain).units]
    fitted = fit(adapter, ground_of(store, base, base_units))
    stored = _write(store, name, adapter, progress)
    tuned = compose_tuned(base_units, fitted, stored.tensors)
    variant, chain = compose_adapter(adapter, base, base_units, tuned, stored)
    return publication_of(store, variant, chain, tuned)


def _write(store: Store, name: str, origin: Checkpoint | Adapter, progress: Progress) -> Stored:
    """Put every tensor and file of the source into the store, read back and compared there."""
    tensors = {
        tensor: store.put_tensor(value.dtype, value.shape, value.data)
        for tensor, value in progress.track(list(origin.tensors.items()), f"storing {name}")
    }
    files = {file: store.put_blob(data) for file, data in origin.files.items()}
    return Stored(name, origin.source, tensors, files)
