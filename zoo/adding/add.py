"""Adding a variant: read the source, find what is shared with the base, write objects, publish.

The source is read and checked before the lock is taken; objects are written before the catalog
names them; what was written is taken back if anything fails on the way.
"""

from pathlib import Path
from typing import TypeAlias

import msgspec

from zoo.adapters.adapter import Adapter
from zoo.adding.finetune import prepare_checkpoint
from zoo.adding.golden import check_golden, golden_sequences, lacking_bytes
from zoo.adding.options import AddOptions, check_options
from zoo.adding.reference import Expected, import_libraries, rebuild, run
from zoo.adding.source import read_source
from zoo.adding.tuning import prepare_adapter
from zoo.adding.weighted import Sum, prepare_sum
from zoo.catalog import Catalog, Publication
from zoo.errors import UnsupportedOption
from zoo.lock import writing
from zoo.manifest import Variant
from zoo.names import checked_name
from zoo.progress import Progress
from zoo.sources.checkpoint import Checkpoint
from zoo.sources.gguf import DTYPES
from zoo.sources.tensorfile import ITEM_BYTES
from zoo.sources.weights import check_finite
from zoo.store import Store
from zoo.zoo import Zoo

Origin: TypeAlias = Checkpoint | Adapter | Sum


def add(root: Path, name: str, source: str, options: AddOptions, progress: Progress) -> Variant:
    """Add the variant `name` from `source` to the zoo at `root`; raises a ZooError and leaves
    nothing."""
    _check(name, options)
    reader = Catalog(root)
    reader.check_free(name, replace=options.replace)
    if options.base is not None:
        reader.variant(options.base)
    reader.close()
    origin = read_source(source, options.dtype)
    for tensor in progress.track(list(origin.tensors), f"checking {name}"):
        check_finite(origin.source, tensor, origin.tensors[tensor])
    if options.golden:
        import_libraries()
    with writing(root, options.wait_s, progress.say):
        catalog = Catalog(root, writable=True)
        store = Store(root)
        try:
            catalog.check_free(name, replace=options.replace)
            publication, expected = _prepare(Zoo(catalog, store), name, origin, options, progress)
            publication = _owned(_checked(root, publication, expected), options)
            store.settle()
            catalog.publish(publication, replace=options.replace)
        except BaseException:
            store.take_back()
            raise
        finally:
            catalog.close()
    return publication.variant


def _check(name: str, options: AddOptions) -> None:
    checked_name(name)
    check_options(options)
    if options.dtype not in DTYPES:
        raise UnsupportedOption(f"--dtype {options.dtype!r} is unknown: use {', '.join(DTYPES)}")


def _prepare(
    zoo: Zoo, name: str, origin: Origin, options: AddOptions, progress: Progress
) -> tuple[Publication, Expected | None]:
    """All that is to be published, and what the source computes, where that is known."""
    if options.store != "exact" and not isinstance(origin, Checkpoint):
        raise UnsupportedOption(
            f"--store {options.store} is for whole fine-tunes: an adapter is small as it is"
        )
    if isinstance(origin, Sum):
        return prepare_sum(zoo, name, origin, options, progress)
    if isinstance(origin, Adapter):
        return prepare_adapter(zoo, name, origin, options, progress)
    publication = prepare_checkpoint(zoo, name, origin, options, progress)
    if not options.golden or publication.variant.store != "exact":
        return publication, None
    return publication, _expected(origin, publication, progress)


def _expected(
    checkpoint: Checkpoint, publication: Publication, progress: Progress
) -> Expected | None:
    """What transformers makes of the checkpoint; None with a remark where memory is wanting."""
    weights = [t for t in checkpoint.tensors.values() if t.dtype in ITEM_BYTES]
    wide = sum(4 * t.data.nbytes // ITEM_BYTES[t.dtype] for t in weights)
    lacking = lacking_bytes(wide, sum(t.data.nbytes for t in weights))
    if lacking > 0:
        progress.say(
            f"{checkpoint.source} is not checked against transformers: {lacking / 1e6:.0f} MB of "
            "memory are wanting to run it whole"
        )
        return None
    variant = publication.variant
    model = rebuild(checkpoint.files, checkpoint.tensors, checkpoint.source)
    sequences = golden_sequences(variant.vocabulary, variant.context)
    return run(model, progress.track(sequences, f"running {variant.name} whole"))


def _checked(root: Path, publication: Publication, expected: Expected | None) -> Publication:
    """The publication, with the golden check's finding; raises NotEqual."""
    if expected is None:
        return publication
    error = check_golden(root, publication, expected)
    variant = msgspec.structs.replace(publication.variant, golden=error)
    return msgspec.structs.replace(publication, variant=variant)


def _owned(publication: Publication, options: AddOptions) -> Publication:
    """The publication, with whose it is: nothing of that comes from its base."""
    variant = msgspec.structs.replace(
        publication.variant, private=options.private, tenant=options.tenant
    )
    return msgspec.structs.replace(publication, variant=variant)
