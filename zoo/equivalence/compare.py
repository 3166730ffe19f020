"""How alike two variants are: weights first, then behaviour with units of one in the chain of the
other, on held-out text."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from zoo.catalog import Catalog
from zoo.door import offline
from zoo.equivalence.chains import can_swap, differing, digest_of, manifests_of, swapped
from zoo.equivalence.corpus import Corpus, read_corpus, tokenizer_of, tokenizer_print
from zoo.equivalence.distance import Distance, Sums, together, unit_sums
from zoo.equivalence.edges import Edge, Edges, Level, key_of
from zoo.equivalence.probe import SEED, Probe
from zoo.errors import Incomparable
from zoo.manifest import ChainDigest, Manifests, Variant
from zoo.partition import cut, partition
from zoo.progress import Progress
from zoo.store import Store

# Blocks and units whose weights point in directions further apart than this are not run.
LEAST_COSINE = 0.5


class Comparison(msgspec.Struct, frozen=True):
    """Two variants: the edges that were found, the whole chain's first, and the cosine and relative
    norm of each tensor's change, by unit and role."""

    one: str
    other: str
    text: str
    edges: list[Edge]
    tensors: dict[str, Distance]


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """`units` asks for each unit by itself too; `wait_s` is how long the lock may take."""

    data: Path | None = None
    rows: int = 64
    units: bool = False
    wait_s: float = 600.0


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two variants whose text has the same tokens, and what they are compared on."""

    one: Variant
    other: Variant
    here: Manifests
    there: Manifests
    corpus: Corpus
    sums: dict[int, dict[str, Sums]]

    @property
    def fits(self) -> bool:
        """Whether units of one could stand in the chain of the other."""
        return can_swap(self.here, self.there)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One edge to be: the units [first, last) of the other chain, put into the first's."""

    level: Level
    first: int
    last: int


def compare(
    root: Path, one: str, other: str, options: CompareOptions, progress: Progress
) -> Comparison:
    """Measure what is not known yet of two variants. Raises Incomparable where that means nothing
    or must not be."""
    with contextlib.closing(Catalog(root)) as catalog:
        pair = _pair(catalog, Store(root), one, other, options)
        plans = list(_plans(catalog, pair, options))
    edges = Edges(root, options.wait_s, progress)
    # What comes to the same chain is one edge: a block of one unit, or all that differs.
    wanted: dict[str, _Plan] = {}
    for plan in plans:
        wanted.setdefault(key_of(pair.one.chain, _became(pair, plan), pair.corpus.digest), plan)
    known = {key: edge for key in wanted if (edge := edges.get(key))}
    if known:
        progress.say(f"{len(known)} of {len(wanted)} edges were measured before")
    with contextlib.ExitStack() as stack:
        probe: Probe | None = None
        for number, (key, plan) in enumerate(wanted.items(), 1):
            if key in known:
                continue
            edge = _unmeasured(pair, plan)
            if _became(pair, plan) == pair.one.chain:
                edge = edge.of_equals()
            elif _is_near(edge):
                if probe is None:
                    probe = Probe(
                        stack.enter_context(offline(root)), pair.corpus, pair.here, progress
                    )
                label = f"{number} of {len(wanted)}, {_label(edge)}"
                edge = edge.with_measured(probe.agreement(_chain(pair, plan), label))
            edges.put(key, edge)
            known[key] = edge
    found = [known[key] for key in wanted]
    return Comparison(one, other, pair.corpus.name, found, _tensors(pair))


def _pair(catalog: Catalog, store: Store, one: str, other: str, options: CompareOptions) -> _Pair:
    here, there = catalog.variant(one), catalog.variant(other)
    if (here.private or there.private) and here.tenant != there.tenant:
        raise Incomparable(
            f"{one!r} and {other!r} belong to different tenants and one of them is private: "
            "nothing is measured between them"
        )
    if tokenizer_print(store, here) != tokenizer_print(store, there):
        raise Incomparable(
            f"{one!r} and {other!r} have different tokenizers: their next tokens mean different "
            "things and cannot be compared"
        )
    longest = min(here.context, there.context)
    corpus = read_corpus(tokenizer_of(store, here), options.data, options.rows, longest)
    chains = manifests_of(catalog, here), manifests_of(catalog, there)
    sums: dict[int, dict[str, Sums]] = {}
    if can_swap(*chains):
        for place in range(len(chains[0].units)):
            found = unit_sums(store, chains[0].units[place][1], chains[1].units[place][1])
            if found is not None:
                sums[place] = found
    return _Pair(here, there, *chains, corpus, sums)


def _plans(catalog: Catalog, pair: _Pair, options: CompareOptions) -> Iterator[_Plan]:
    """The whole chain, then the blocks that differ, then each unit that does."""
    last = len(pair.there.units)
    yield _Plan("chain", 0, last)
    if not pair.fits:
        return
    other = set(differing(pair.here, pair.there))
    for span in _blocks(catalog, pair):
        if other.intersection(range(*span)) and span != (0, last):
            yield _Plan("block", *span)
    if options.units:
        yield from (_Plan("unit", place, place + 1) for place in sorted(other))


def _blocks(catalog: Catalog, pair: _Pair) -> list[tuple[int, int]]:
    """Where the blocks of the first chain lie, as all chains of the zoo cut them."""
    chains = [catalog.chain(variant.chain).units for variant in catalog.variants()]
    return cut([digest for digest, _ in pair.here.units], partition(chains))


def _chain(pair: _Pair, plan: _Plan) -> Manifests:
    if plan.level == "chain":
        return pair.there
    return swapped(pair.here, pair.there, range(plan.first, plan.last))


def _became(pair: _Pair, plan: _Plan) -> ChainDigest:
    return digest_of(_chain(pair, plan))


def _unmeasured(pair: _Pair, plan: _Plan) -> Edge:
    places = range(plan.first, plan.last)
    weights = None
    if all(place in pair.sums for place in places):
        weights = together({f"{p} {role}": s for p in places for role, s in pair.sums[p].items()})
    return Edge(
        level=plan.level,
        one=pair.one.name,
        other=pair.other.name,
        first=plan.first,
        last=plan.last,
        weights=weights,
        corpus=pair.corpus.digest,
        text=pair.corpus.name,
        sequences=len(pair.corpus.passages),
        tokens=sum(passage.num_predicted for passage in pair.corpus.passages),
        created=time.time(),
        seed=SEED,
    )


def _is_near(edge: Edge) -> bool:
    """Whether it is worth running: whole chains always are."""
    return edge.level == "chain" or edge.weights is None or edge.weights.cosine >= LEAST_COSINE


def _label(edge: Edge) -> str:
    return edge.level if edge.level == "chain" else f"{edge.level} {edge.first}-{edge.last - 1}"


def _tensors(pair: _Pair) -> dict[str, Distance]:
    return {
        f"{place} {role}": sums.distance()
        for place, roles in pair.sums.items()
        for role, sums in roles.items()
        if sums.difference
    }
