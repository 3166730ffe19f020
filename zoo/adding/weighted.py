"""Several adapters of one base, weighted and added up, as one variant: `a+0.5*b`.

The low-rank pieces of the terms stand side by side: they share the terms' tensors and carry the
weights in their scales. It is what peft's add_weighted_adapter calls "cat"."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from zoo.adapters.adapter import CONFIG_NAME, STEM, read_adapter
from zoo.adapters.summed import lora_of
from zoo.adding.golden import golden_sequences
from zoo.adding.options import AddOptions
from zoo.adding.reference import Expected, run
from zoo.adding.witness import call_witness, lacks
from zoo.catalog import Catalog, Publication
from zoo.compose import (
    Tuned,
    attachment_digest,
    ground_of,
    publication_of,
    variant_upon,
    with_files_of,
)
from zoo.errors import BadAdapter
from zoo.families.registry import family_named
from zoo.manifest import Attachment, Chain, LowRank, Variant
from zoo.progress import Progress
from zoo.sources.weights import SourceTensor
from zoo.sources.writer import write_tensors
from zoo.stored import Stored
from zoo.zoo import Zoo

KIND = "sum"
_TERM = re.compile(r"(?:(?P<weight>-?\d+(?:\.\d+)?)\*)?(?P<name>[A-Za-z0-9][A-Za-z0-9._:/-]*)")
_REASONS = {
    "gain": "its gains (DoRA, IA3) multiply and do not add up",
    "input_gain": "its gains (IA3) multiply and do not add up",
    "prefix": "of two prefixes only one can stand before a request",
    "soft_prompt": "of two prompts only one can stand before a request",
    "bottleneck": "its bottlenecks are not linear",
}
_WHOLE = "it brings whole tensors, which do not add up"


@dataclass(frozen=True, slots=True)
class Term:
    """A variant and its weight."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class Sum:
    """A source that is made of variants of the zoo."""

    source: str
    terms: tuple[Term, ...]

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """It brings none of its own."""
        return {}


def read_sum(source: str) -> Sum | None:
    """`source` read as weighted names, if it is that and no path."""
    if not {"+", "*"} & set(source) or Path(source).expanduser().exists():
        return None
    found = [_TERM.fullmatch(part.strip()) for part in source.split("+")]
    terms = tuple(Term(term["name"], float(term["weight"] or 1)) for term in found if term)
    return Sum(source, terms) if len(terms) == len(found) else None


def prepare_sum(
    zoo: Zoo, name: str, asked: Sum, options: AddOptions, progress: Progress
) -> tuple[Publication, Expected | None]:
    """The variant that the terms make together, and what peft computes with it; raises BadAdapter
    where they do not add up."""
    base, attachments = _add_up(zoo.catalog, asked)
    units = [zoo.catalog.unit(unit) for unit in zoo.catalog.chain(base.chain).units]
    config, tensors = lora_of(zoo.store, family_named(base.family), units, attachments)
    chain = Chain(
        zoo.catalog.chain(base.chain).units,
        tuple(found and attachment_digest(found) for found in attachments),
    )
    attached = sum(found is not None for found in attachments)
    report = {"shared": len(units), "changed": 0, "attached": attached}
    stored = Stored(name, asked.source, {}, {CONFIG_NAME: zoo.store.put_blob(config)})
    variant = with_files_of(base, variant_upon(base, KIND, chain, report, stored))
    publication = publication_of(zoo.store, variant, chain, Tuned(units, attachments))
    trouble = lacks(zoo.store, base, "LORA") if options.golden else "unasked"
    if trouble:
        if options.golden:
            progress.say(f"{asked.source} is not checked against peft: {trouble}")
        return publication, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / CONFIG_NAME).write_bytes(config)
        write_tensors(path / f"{STEM}.safetensors", tensors, progress)
        adapter = read_adapter(path, asked.source)
        ground = ground_of(zoo.store, base, units)
        model = call_witness(zoo.store, base, adapter, ground, 0)
        sequences = golden_sequences(base.vocabulary, base.context)
        return publication, run(model, progress.track(sequences, f"running {name} whole"))


def _add_up(catalog: Catalog, asked: Sum) -> tuple[Variant, list[Attachment | None]]:
    """The terms' base, and the attachments of the sum."""
    variants = [catalog.variant(term.name) for term in asked.terms]
    base = _common_base(catalog, variants)
    units = catalog.chain(base.chain).units
    pieces: list[list[LowRank]] = [[] for _ in units]
    for term, variant in zip(asked.terms, variants, strict=True):
        chain = catalog.chain(variant.chain)
        if chain.units != units:
            raise BadAdapter(f"{variant.name!r} cannot be added to others: {_WHOLE}")
        for index, digest in enumerate(chain.attachments):
            if digest is not None:
                pieces[index] += _weighted(catalog.attachment(digest), term)
    if not any(pieces):
        raise BadAdapter(f"{asked.source} changes nothing of {base.name!r}: all weights are 0")
    return base, [Attachment(tuple(found)) if found else None for found in pieces]


def _common_base(catalog: Catalog, variants: Sequence[Variant]) -> Variant:
    """The one base of all terms."""
    for variant in variants:
        if variant.base is None or not any(catalog.chain(variant.chain).attachments):
            raise BadAdapter(f"{variant.name!r} is no adapter: only adapters can be added up")
    bases = {variant.base: None for variant in variants}
    if len(bases) > 1:
        raise BadAdapter(f"adapters of several bases do not add up: {', '.join(map(str, bases))}")
    (name,) = bases
    assert name is not None, "every term has one"
    return catalog.variant(name)


def _weighted(attachment: Attachment, term: Term) -> list[LowRank]:
    found: list[LowRank] = []
    for piece in attachment.pieces:
        if not isinstance(piece, LowRank):
            reason = _REASONS.get(str(piece.__struct_config__.tag), _WHOLE)
            raise BadAdapter(f"{term.name!r} cannot be added to others: {reason}")
        if term.weight:
            found.append(msgspec.structs.replace(piece, scale=piece.scale * term.weight))
    return found
