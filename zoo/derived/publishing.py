"""A network becomes a variant: its tensors objects, its parts units, its chain a name.

Tensors that it has from the true chain are bit-equal to those that are there, so they are stored
once and batched together.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from zoo.catalog import Catalog
from zoo.compose import Tuned, chain_digest, publication_of, unit_digest, variant_upon
from zoo.derived.config import config_of
from zoo.derived.network import Network
from zoo.derived.subject import Subject, check_free
from zoo.families.family import HEAD, TOKENS, Place
from zoo.families.registry import family_named
from zoo.lock import writing
from zoo.manifest import Chain, EmbedSpec, ObjectDigest, Unit, Variant
from zoo.progress import Progress
from zoo.store import Store
from zoo.stored import Stored
from zoo.zoo import Zoo

_DTYPES = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be published as `name`: made from `origin`, of whose layers it has `kept`, by
    `make`, which stores what is new and gives the units, bottom first."""

    name: str
    kind: str
    origin: Subject
    make: Callable[[Store], list[Unit]]
    kept: tuple[int, ...] = ()


def publish(root: Path, draft: Draft, wait_s: float, progress: Progress) -> Variant:
    """Store and publish; raises NameTaken if the name means another chain."""
    with opened(root, wait_s, progress) as zoo:
        units = draft.make(zoo.store)
        chain = Chain(tuple(unit_digest(unit) for unit in units), (None,) * len(units))
        check_free(root, draft.name, chain_digest(chain))
        variant = _variant(zoo.store, draft, units, chain)
        publication = publication_of(zoo.store, variant, chain, Tuned(units, []))
        zoo.store.settle()
        zoo.catalog.publish(publication, replace=True)
    return variant


@contextlib.contextmanager
def opened(root: Path, wait_s: float, progress: Progress) -> Generator[Zoo]:
    """The zoo, open for writing; what was written is taken back if anything fails."""
    with (
        writing(root, wait_s, progress.say),
        contextlib.closing(Catalog(root, writable=True)) as catalog,
    ):
        store = Store(root)
        try:
            yield Zoo(catalog, store)
        except BaseException:
            store.take_back()
            raise


def put(store: Store, tensor: Tensor, dtype: str) -> ObjectDigest:
    """Keep a tensor in the data type of that name."""
    kind, name = _DTYPES[dtype]
    data = tensor.detach().to(kind).contiguous()
    raw = data.view(torch.uint8).numpy().tobytes()
    return store.put_tensor(name, tuple(data.shape), raw)


def stored(store: Store, network: Network, dtype: str, progress: Progress) -> list[Unit]:
    """The units of a network, its tensors kept in the data type of that name."""
    known: dict[int, ObjectDigest] = {}
    units: list[Unit] = []
    for part in progress.track(network.parts, "storing units"):
        for tensor in part.weights.values():
            if id(tensor) not in known:
                known[id(tensor)] = put(store, tensor, dtype)
        roles = {role: known[id(tensor)] for role, tensor in part.weights.items()}
        units.append(Unit(part.spec, roles))
    return units


def _variant(store: Store, draft: Draft, units: Sequence[Unit], chain: Chain) -> Variant:
    true = draft.origin.variant
    theirs = set(draft.origin.digests)
    shared = sum(unit in theirs for unit in chain.units)
    tied = units[0].tensors[TOKENS] == units[-1].tensors[HEAD]
    embed = units[0].spec
    assert isinstance(embed, EmbedSpec)
    files = {name: blob for name, blob in true.files.items() if not name.endswith(".md")}
    told, config = files.pop("config.json", None), None
    if told is not None and draft.kept:
        specs = [unit.spec for unit in units]
        config = config_of(store.blob(told), true.family, specs, draft.kept, tied=tied)
    if config is not None:
        files["config.json"] = store.put_blob(config)
    tensors = _named(true.family, units, tied=tied) if config is not None else {}
    report = {"shared": shared, "changed": len(units) - shared, "attached": 0}
    brought = Stored(draft.name, f"{draft.kind} of {true.name}", tensors, files)
    variant = variant_upon(true, draft.kind, chain, report, brought)
    return msgspec.structs.replace(variant, hidden=embed.hidden)


def _named(family: str, units: Sequence[Unit], *, tied: bool) -> dict[str, ObjectDigest]:
    """The tensors as a checkpoint of the family names them."""
    known = family_named(family)
    layers = known.num_layers(len(units))
    return {
        known.tensor_name(Place(index, role), layers): tensor
        for index, unit in enumerate(units)
        for role, tensor in unit.tensors.items()
        if not (tied and role == HEAD)
    }
