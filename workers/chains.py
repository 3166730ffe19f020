"""The chains a worker serves: their units, how they cut into blocks, where their prefixes part.

Everything here is derived from manifests when a chain comes or goes: blocks (the longest runs of
units that all chains using them use whole) and branches (depths where chains with a common prefix
part). Pure bookkeeping, no torch; owned by `workers.worker`, read by requests, batcher and runner.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.wire import ChainId
from zoo.errors import ZooError
from zoo.manifest import (
    Attachment,
    AttachmentDigest,
    AttentionSpec,
    EmbedSpec,
    ForeignSpec,
    Manifests,
    MlpSpec,
    ParallelSpec,
    Prefix,
    SoftPrompt,
    StitchSpec,
    Unit,
    UnitDigest,
    attention_of,
    virtual_tokens,
)
from zoo.partition import cut, partition


class UnservableChain(ZooError):
    """This worker cannot run that chain; the message says why."""


KvElement = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a page of this chain holds: heads and head width of K and V, and their precision."""

    kv_heads: int
    head_dim: int
    element: KvElement = "float32"


@dataclass(frozen=True, slots=True)
class BlockRange:
    """A block in a chain: units [first, last). `key` is one for all chains that have these units at
    this depth, above as many attention layers; `limit` is the most rows it takes at once."""

    key: int
    first: int
    last: int
    limit: int


@dataclass(eq=False, slots=True)
class ServedChain:
    """A chain in use. `lineages[d]` names units [0, d) with their attachments; `layers[u]` is the
    attention layer of unit u (or the number of layers below it); `full_depth` is the depth below
    which all attention layers lie. From depth `tail` on, units see of other rows no more than the
    keys and values that its first unit writes, so only rows whose logits are wanted go there.
    `branches` are the depths where other chains part from it.

    `hidden` is the width of the stream at the bottom, `stitches` are depths from which on it has
    another. `virtual` positions stand before a request's first token; the KV of the first `seeded`
    of them (all or none) are given, not computed. `context` counts them, `vocabulary` the logits of
    a row."""

    id: ChainId
    unit_digests: tuple[UnitDigest, ...]
    attachment_digests: tuple[AttachmentDigest | None, ...]
    units: tuple[Unit, ...]
    attachments: tuple[Attachment | None, ...]
    context: int
    lineages: tuple[str, ...]
    layers: tuple[int, ...]
    tail: int
    kv: KvShape
    hidden: int
    vocabulary: int = 0
    virtual: int = 0
    seeded: int = 0
    stitches: tuple[tuple[int, int], ...] = ()
    blocks: tuple[BlockRange, ...] = ()
    branches: tuple[int, ...] = ()
    users: int = 0
    leaving: bool = False

    @property
    def num_layers(self) -> int:
        return self.layers[-1]

    @property
    def full_depth(self) -> int:
        return self.layers.index(self.num_layers)

    def width(self, depth: int) -> int:
        """The width of the stream that enters unit `depth`."""
        return next((w for d, w in reversed(self.stitches) if d <= depth), self.hidden)

    @property
    def group(self) -> tuple[int, KvShape]:
        """Chains of one group can share a wave: same width, same pages."""
        return (self.hidden, self.kv)

    @property
    def is_foreign(self) -> bool:
        """Whether some of its units are layers of classes that are not ours."""
        return any(isinstance(unit.spec, ForeignSpec) for unit in self.units)

    @property
    def path(self) -> tuple[int, ...]:
        """The keys of its blocks, bottom first."""
        return tuple(block.key for block in self.blocks)

    def index_depths(self) -> list[tuple[str, int | None]]:
        """Lineages under which a column of this chain may be found, deepest first: all of it
        (depth None), then each branch."""
        full = self.full_depth
        partial = [(self.lineages[d], d) for d in reversed(self.branches) if d < full]
        return [(self.lineages[full], None), *partial]


def describe(chain: ChainId, manifests: Manifests) -> ServedChain:
    """Lay out a chain from its manifests, bottom first."""
    units, attachments = manifests.units, manifests.attachments
    first = units[0][1].spec
    if not isinstance(first, EmbedSpec):
        raise UnservableChain("the chain does not begin with an embedding")
    layers, lineages, shapes = [0], [""], set[KvShape]()
    for (unit_digest, unit), attachment in zip(units, attachments, strict=True):
        attention = attention_of(unit.spec)
        layers.append(layers[-1] + (attention is not None))
        if attention is not None:
            shapes.add(KvShape(attention.kv_heads, attention.head_dim))
        piece = f"{lineages[-1]}/{unit_digest}+{attachment[0] if attachment else ''}"
        lineages.append(hashlib.blake2b(piece.encode(), digest_size=16).hexdigest())
    if len(shapes) != 1:
        raise UnservableChain("its attention layers have KV of several shapes")
    virtual, seeded = _virtual(units, attachments)
    return ServedChain(
        id=chain,
        unit_digests=tuple(d for d, _ in units),
        attachment_digests=tuple(a[0] if a else None for a in attachments),
        units=tuple(u for _, u in units),
        attachments=tuple(a[1] if a else None for a in attachments),
        context=manifests.context + virtual,
        virtual=virtual,
        seeded=seeded,
        lineages=tuple(lineages),
        layers=tuple(layers),
        tail=_tail(units),
        kv=shapes.pop(),
        hidden=first.hidden,
        stitches=tuple(
            (depth, unit.spec.width)
            for depth, (_, unit) in enumerate(units, 1)
            if isinstance(unit.spec, StitchSpec)
        ),
    )


def _tail(units: Sequence[tuple[UnitDigest, Unit]]) -> int:
    """The depth of the head, or of the MLPs right below it and the attention below these."""
    depth = len(units) - 1
    while isinstance(units[depth - 1][1].spec, MlpSpec):
        depth -= 1
    attends = isinstance(units[depth - 1][1].spec, AttentionSpec | ParallelSpec)
    return depth - 1 if attends else depth


def _virtual(
    units: Sequence[tuple[UnitDigest, Unit]],
    attachments: Sequence[tuple[AttachmentDigest, Attachment] | None],
) -> tuple[int, int]:
    """Virtual positions of a chain: how many, and of how many the KV are given."""
    lengths: set[int] = set()
    for (_, unit), attachment in zip(units, attachments, strict=True):
        if attention_of(unit.spec) is not None:
            pieces = attachment[1].pieces if attachment else ()
            lengths.add(sum(p.length for p in pieces if isinstance(p, Prefix)))
    if len(lengths) > 1:
        raise UnservableChain("its attention layers have prefixes of different lengths")
    virtual, seeded = virtual_tokens(a[1] for a in attachments if a), lengths.pop()
    if seeded and any(isinstance(p, SoftPrompt) for a in attachments if a for p in a[1].pieces):
        raise UnservableChain("it has both a prefix and a soft prompt")
    return virtual, seeded


class Chains:
    """The chains in use by number; recuts blocks and branches whenever the set changes.

    `limit` is the most rows that any block takes at once; `cuts` counts how often they were cut."""

    def __init__(self, limit: int) -> None:
        self.cuts = 0
        self._limit = limit
        self._chains: dict[ChainId, ServedChain] = {}
        self._keys: dict[tuple[tuple[UnitDigest, ...], int, int], int] = {}

    def __iter__(self) -> Iterator[ServedChain]:
        return iter(self._chains.values())

    def __len__(self) -> int:
        return len(self._chains)

    def get(self, chain: ChainId) -> ServedChain | None:
        return self._chains.get(chain)

    def add(self, chain: ServedChain) -> None:
        self._chains[chain.id] = chain
        self._recut()

    def remove(self, chain: ChainId) -> None:
        del self._chains[chain]
        self._recut()

    def _recut(self) -> None:
        self.cuts += 1
        chains = list(self._chains.values())
        blocks = partition([c.unit_digests for c in chains])
        parts: dict[str, set[str]] = {}
        for c in chains:
            for below, above in zip(c.lineages, c.lineages[1:], strict=False):
                parts.setdefault(below, set()).add(above)
        for c in chains:
            c.blocks = tuple(
                BlockRange(self._key(c, first, last), first, last, self._limit)
                for first, last in cut(c.unit_digests, blocks)
            )
            c.branches = tuple(
                d
                for d in range(1, len(c.units))
                if c.layers[d] > 0 and len(parts[c.lineages[d]]) > 1
            )

    def _key(self, chain: ServedChain, first: int, last: int) -> int:
        named = (chain.unit_digests[first:last], first, chain.layers[first])
        return self._keys.setdefault(named, len(self._keys))
