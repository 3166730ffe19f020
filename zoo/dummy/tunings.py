"""Small variants without weights: LoRA adapters on every linear layer, and full fine-tunes kept as
low-rank differences to their base."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from zoo.adapters.adapter import CONFIG_NAME, Adapter
from zoo.adapters.ground import Ground
from zoo.adding.finetune import compose_checkpoint, compose_units
from zoo.adding.options import AddOptions
from zoo.adding.tuning import prepare_adapter
from zoo.catalog import Publication
from zoo.compose import (
    Tuned,
    attachment_digest,
    chain_digest,
    ground_of,
    publication_of,
    unit_digest,
)
from zoo.deltas.delta import outline
from zoo.dummy.models import Models
from zoo.dummy.recipe import BASE
from zoo.families.family import Place
from zoo.manifest import Attachment, Chain, ForeignSpec, LowRank, ObjectDigest, Unit
from zoo.progress import Quiet
from zoo.sources.checkpoint import sort_units
from zoo.sources.weights import SourceTensor
from zoo.stored import store_origin
from zoo.zoo import Zoo

_UPON_BASE = AddOptions(base=BASE, golden=False)


def lora(zoo: Zoo, models: Models, name: str) -> Publication:
    """An adapter as peft would have saved it, put upon the base as any other is."""
    rank, ground = models.recipe.rank, _ground(zoo)
    tensors: dict[str, SourceTensor] = {}
    for linear in _linears(ground):
        width, out = ground.widths(linear)
        path = _module(ground, linear)
        for half, shape in (("A", (rank, width)), ("B", (out, rank))):
            tensor = f"base_model.model.{path}.lora_{half}.weight"
            tensors[tensor] = models.tensor(name, tensor, shape)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({_module(ground, one).split(".")[-1] for one in _linears(ground)}),
        "bias": "none",
    }
    adapter = Adapter(
        source=f"dummy:{models.recipe.config}",
        folder=Path(),
        method="LORA",
        wanted=None,
        settings=settings,
        tensors=tensors,
        files={CONFIG_NAME: json.dumps(settings).encode()},
    )
    return prepare_adapter(zoo, name, adapter, _UPON_BASE, Quiet())[0]


def delta(zoo: Zoo, models: Models, name: str) -> Publication:
    """A full fine-tune as `--store delta` keeps one: norms and biases its own, a low-rank
    difference to every matrix."""
    base = zoo.catalog.variant(BASE)
    ground = _ground(zoo)
    whole = models.full(name)
    sources = sort_units(whole)
    stored = store_origin(zoo.store, name, whole, Quiet())
    found = outline(ground.units, compose_units(sources, stored.tensors))
    for site in found.sites:
        piece = _low_rank(zoo, models, name, ground, Place(site.unit, site.role))
        found.pieces[site.unit].append(piece)
    variant, _ = compose_checkpoint(zoo.catalog, whole, found.units, stored, base)
    chain = _chain(found.units, found.attachments)
    attached = sum(a is not None for a in chain.attachments)
    variant = msgspec.structs.replace(
        variant,
        store="delta",
        kind="full",
        chain=chain_digest(chain),
        tensors={},
        report=variant.report | {"attached": attached},
    )
    return publication_of(zoo.store, variant, chain, Tuned(found.units, found.attachments))


def _low_rank(zoo: Zoo, models: Models, name: str, ground: Ground, place: Place) -> LowRank:
    width, out = ground.widths(place)
    rank = min(models.recipe.delta_rank, width, out)

    def put(half: str, shape: tuple[int, ...]) -> ObjectDigest:
        tensor = models.tensor(name, f"{place.unit}.{place.role}.{half}", shape)
        return zoo.store.put_tensor(tensor.dtype, tensor.shape, tensor.data)

    return LowRank(place.role, put("a", (rank, width)), put("b", (out, rank)), rank, 1.0)


def _ground(zoo: Zoo) -> Ground:
    base = zoo.catalog.variant(BASE)
    units = [zoo.catalog.unit(unit) for unit in zoo.catalog.chain(base.chain).units]
    return ground_of(zoo.store, base, units)


def _linears(ground: Ground) -> Iterator[Place]:
    """Every linear layer between embedding and head."""
    for unit, shapes in list(enumerate(ground.shapes))[1:-1]:
        spec = ground.specs[unit]
        for tensor, shape in shapes.items():
            role, _, kind = tensor.rpartition(".")
            is_linear = not isinstance(spec, ForeignSpec) or role in spec.linears
            if kind == "weight" and len(shape) == 2 and is_linear:
                yield Place(unit, role)


def _module(ground: Ground, linear: Place) -> str:
    """The path of a linear layer in the model's own terms."""
    name = ground.family.tensor_name(Place(linear.unit, f"{linear.role}.weight"), ground.num_layers)
    return name.removesuffix(".weight")


def _chain(units: list[Unit], attachments: list[Attachment | None]) -> Chain:
    return Chain(
        tuple(unit_digest(unit) for unit in units),
        tuple(a and attachment_digest(a) for a in attachments),
    )
