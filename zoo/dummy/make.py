"""Makes a dummy zoo, or adds to one what a recipe names and it lacks."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from zoo.adding.finetune import prepare_checkpoint
from zoo.adding.options import AddOptions
from zoo.catalog import Catalog, Publication
from zoo.dummy.models import Models, read_models
from zoo.dummy.recipe import BASE, Recipe
from zoo.dummy.store import DummyStore
from zoo.dummy.tunings import delta, lora
from zoo.errors import BadSource
from zoo.lock import writing
from zoo.progress import Progress, Quiet
from zoo.zoo import Zoo

# How a variant of that name is composed.
_Make = Callable[[Zoo, Models, str], Publication]


def make(root: Path, recipe: Recipe, progress: Progress, wait_s: float = 600.0) -> list[str]:
    """Fill the zoo at `root`; the names that are new. Variants that are there stay as they are.
    Raises a ZooError."""
    models = read_models(recipe)
    added: list[str] = []
    with (
        writing(root, wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        zoo = Zoo(catalog, DummyStore(root))
        there = _there(catalog, models)
        wanted = {name: how for name, how in _wanted(recipe).items() if name not in there}
        for name, how in progress.track(list(wanted.items()), f"making {root.name}"):
            publication = how(zoo, models, name)
            zoo.store.settle()
            catalog.publish(_marked(publication))
            added.append(name)
    return added


def missing(root: Path, recipe: Recipe) -> list[str]:
    """The names that `make` would add."""
    with contextlib.closing(Catalog(root)) as catalog:
        there = {variant.name for variant in catalog.variants()}
    return [name for name in _wanted(recipe) if name not in there]


def _wanted(recipe: Recipe) -> dict[str, _Make]:
    """Every variant of a recipe, the base first."""
    kinds: tuple[tuple[str, int, _Make], ...] = (
        ("lora", recipe.loras, lora),
        ("last", recipe.lasts, _last),
        ("full", recipe.fulls, _full),
        ("delta", recipe.deltas, delta),
    )
    numbered = {f"{kind}-{i}": how for kind, count, how in kinds for i in range(count)}
    return {BASE: _base} | numbered


def _base(zoo: Zoo, models: Models, name: str) -> Publication:
    return prepare_checkpoint(zoo, name, models.base(), AddOptions(), Quiet())


def _last(zoo: Zoo, models: Models, name: str) -> Publication:
    return prepare_checkpoint(zoo, name, models.last(name), AddOptions(base=BASE), Quiet())


def _full(zoo: Zoo, models: Models, name: str) -> Publication:
    return prepare_checkpoint(zoo, name, models.full(name), AddOptions(base=BASE), Quiet())


def _there(catalog: Catalog, models: Models) -> set[str]:
    """The variants that the zoo holds; raises BadSource unless they are dummies of that recipe."""
    variants = {variant.name: variant for variant in catalog.variants()}
    if any(not variant.dummy for variant in variants.values()):
        raise BadSource(
            f"{catalog.root} holds variants with weights: give dummies a folder of their own"
        )
    if BASE in variants:
        store = DummyStore(catalog.root)
        told = {
            name: store.put_tensor(tensor.dtype, tensor.shape, tensor.data)
            for name, tensor in models.base().tensors.items()
        }
        if variants[BASE].tensors != told:
            raise BadSource(
                f"the base in {catalog.root} is of another config, seed or data type: give another "
                "folder"
            )
    return set(variants)


def _marked(publication: Publication) -> Publication:
    variant = msgspec.structs.replace(publication.variant, dummy=True)
    return msgspec.structs.replace(publication, variant=variant)
