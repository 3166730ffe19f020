"""A fine-tune as its base's units and small pieces upon them: the `delta` way of storing one.

Matrices get low-rank differences that come nearest in what they make of text, their ranks allotted
over the whole model under one byte budget; norms and biases are small and stay exact; what no piece
can express makes its unit the variant's own. Served by the kernels and in the batches that LoRA
has.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.deltas.calibration import Calibration, Place
from zoo.deltas.lowrank import Factors, allot, factorize, factorize_for
from zoo.errors import BadCheckpoint
from zoo.manifest import (
    Attachment,
    AttentionSpec,
    Bias,
    EmbedSpec,
    ForeignSpec,
    LowRank,
    MlpSpec,
    NormWeights,
    ObjectDigest,
    ParallelSpec,
    Piece,
    Spec,
    Unit,
)
from zoo.progress import Progress
from zoo.store import Store, StoredTensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LINEARS = {"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head", "tokens"}
_TOKENS = "tokens"
_NORMS = {"norm", "mlp_norm", "q_norm", "k_norm", "post_norm"}


@dataclass(frozen=True, slots=True)
class Site:
    """A matrix that moved: the unit and role, the base's tensor and the fine-tune's."""

    unit: int
    role: str
    before: ObjectDigest
    after: ObjectDigest


@dataclass(frozen=True, slots=True)
class Change:
    """A difference of matrices, and all sites that have it."""

    spec: Spec
    sites: tuple[Site, ...]

    @property
    def place(self) -> Place:
        """Where it reads activations, or the embedding if tokens are only looked up in it."""
        places = [(site.unit, site.role) for site in self.sites]
        return next((place for place in places if place[1] != _TOKENS), places[0])

    def before(self, store: Store) -> Tensor:
        """The base's matrix, float32 [out, in], of a table of tokens [vocabulary, hidden]."""
        return self._read(store, self.sites[0].before)

    def after(self, store: Store) -> Tensor:
        """The fine-tune's, alike."""
        return self._read(store, self.sites[0].after)

    def _read(self, store: Store, digest: ObjectDigest) -> Tensor:
        stored = _matrix(store, digest)
        return stored.T.contiguous() if _is_transposed(self.spec) else stored


@dataclass(slots=True)
class Delta:
    """A fine-tune upon its base: units and, beside each, its pieces. `sites` are the matrices that
    moved."""

    units: list[Unit]
    pieces: list[list[Piece]]
    sites: list[Site] = field(default_factory=list)

    @property
    def attachments(self) -> list[Attachment | None]:
        """The pieces, as manifests."""
        return [Attachment(tuple(pieces)) if pieces else None for pieces in self.pieces]


def compress(
    store: Store,
    base: Sequence[Unit],
    tuned: Sequence[Unit],
    share: float,
    progress: Progress,
    calibration: Calibration | None = None,
) -> Delta:
    """Approximate `tuned` upon `base` with at most `share` of the bytes of its tensors, as near as
    can be in what its matrices make of the text of `calibration`, or without one in the matrices
    themselves. What is exact comes first; raises BadCheckpoint where the budget is too small even
    for that."""
    delta = outline(base, tuned)
    budget = int(share * _bytes(store, (d for unit in tuned for d in unit.tensors.values())))
    spent = _bytes(store, _own(base, delta))
    if spent > budget:
        raise BadCheckpoint(
            f"{spent} bytes of this fine-tune have to be kept exactly and the budget is {budget}: "
            "raise --delta-budget or use --store exact"
        )
    # A table that embedding and head share moved once and gets one rank.
    groups: dict[tuple[ObjectDigest, ObjectDigest], list[Site]] = {}
    for site in delta.sites:
        groups.setdefault((site.before, site.after), []).append(site)
    changes = [Change(base[sites[0].unit].spec, tuple(sites)) for sites in groups.values()]
    moved = list(_factorized(store, changes, calibration, progress))
    ranks = allot([(factors, len(one.sites)) for one, factors in moved], budget - spent)
    for (change, factors), rank in zip(moved, ranks, strict=True):
        for site in change.sites if rank else ():
            piece = _piece(store, base[site.unit].spec, site, factors, rank)
            delta.pieces[site.unit].append(piece)
    return delta


def _factorized(
    store: Store, changes: Sequence[Change], calibration: Calibration | None, progress: Progress
) -> Iterator[tuple[Change, Factors]]:
    """The factors of every change. With text their energies are shares of what the fine-tune's own
    matrix makes of it: an error in what an attention reads and one in the logits are no equals."""
    if calibration is None:
        for one in progress.track(changes, "decomposing"):
            yield one, factorize(one.after(store) - one.before(store))
        return
    rest = {one.place: one for one in changes}
    for place, moment in calibration.moments([at for at in rest if at[1] != _TOKENS]):
        one = rest.pop(place)
        after = one.after(store)
        made = float((after @ moment).mul_(after).sum())
        yield one, factorize_for(after - one.before(store), moment).relative_to(made)
    for one in rest.values():
        after = one.after(store)
        found = factorize(after - one.before(store))
        yield one, found.relative_to(float(after.square().sum()))


def merged(store: Store, unit: Unit, attachment: Attachment, role: str) -> memoryview | None:
    """The bytes of a unit's matrix with the low-rank pieces upon it added, rounded to its own data
    type; None where there are none."""
    pieces = [
        piece
        for piece in attachment.pieces
        if isinstance(piece, LowRank) and f"{piece.role}.weight" == role
    ]
    if not pieces:
        return None
    stored = store.tensor(unit.tensors[role])
    whole = as_float(stored)
    for piece in pieces:
        whole += difference_of(store, piece, unit.spec)
    return whole.to(_DTYPES[stored.dtype]).reshape(-1).view(torch.uint8).numpy().data


def difference_of(store: Store, piece: LowRank, spec: Spec) -> Tensor:
    """What a low-rank piece adds to the stored matrix of its role, float32 in the way it lies."""
    a, b = _matrix(store, piece.a), _matrix(store, piece.b)
    product = b @ a
    if isinstance(spec, EmbedSpec):
        return product.T * (piece.scale / spec.scale)
    return (product.T if _is_transposed(spec) else product) * piece.scale


def outline(base: Sequence[Unit], tuned: Sequence[Unit]) -> Delta:
    """Say for each tensor that moved what becomes of it; the matrices are left to be factorized."""
    delta = Delta(list(base), [[] for _ in base])
    for place, (theirs, ours) in enumerate(zip(base, tuned, strict=True)):
        if theirs.spec != ours.spec or theirs.tensors.keys() != ours.tensors.keys():
            delta.units[place] = ours
            continue
        kept: dict[str, ObjectDigest] = {}
        norms: dict[str, None] = {}
        for name, digest in ours.tensors.items():
            if digest == theirs.tensors[name]:
                continue
            role, _, kind = name.rpartition(".")
            if kind == "weight" and _is_linear(theirs.spec, role):
                delta.sites.append(Site(place, role, theirs.tensors[name], digest))
            elif kind == "bias" and _is_linear(theirs.spec, role):
                delta.pieces[place].append(Bias(role, digest))
            elif role in _NORMS and not isinstance(theirs.spec, ForeignSpec):
                norms[role] = None
            else:
                kept[name] = digest
        delta.units[place] = Unit(theirs.spec, theirs.tensors | kept)
        for role in norms:
            weight, bias = ours.tensors[f"{role}.weight"], ours.tensors.get(f"{role}.bias")
            delta.pieces[place].append(NormWeights(role, weight, bias))
    return delta


def _is_linear(spec: Spec, role: str) -> bool:
    return role in (spec.linears if isinstance(spec, ForeignSpec) else _LINEARS)


def _own(base: Sequence[Unit], delta: Delta) -> set[ObjectDigest]:
    """What the variant keeps exactly, beside its base's tensors."""
    known = {digest for unit in base for digest in unit.tensors.values()}
    own = {digest for unit in delta.units for digest in unit.tensors.values()}
    for pieces in delta.pieces:
        for piece in pieces:
            if isinstance(piece, Bias):
                own.add(piece.vector)
            elif isinstance(piece, NormWeights):
                own.update(digest for digest in (piece.weight, piece.bias) if digest)
    return own - known


def _piece(store: Store, spec: Spec, site: Site, factors: Factors, rank: int) -> LowRank:
    """Write a matrix's factors and say what they are: y += B(A(x)), A [rank, in], B [out, rank]."""
    left, right = factors.cut(rank)
    scale = 1.0
    if isinstance(spec, EmbedSpec):
        # Rows of the table are tokens: A is looked up by token, B leads to the hidden width.
        left, right, scale = right.T, left.T, spec.scale
    return LowRank(site.role, _put(store, right), _put(store, left), rank, scale)


def _is_transposed(spec: Spec) -> bool:
    return isinstance(spec, AttentionSpec | MlpSpec | ParallelSpec) and spec.transposed


def _put(store: Store, matrix: Tensor) -> ObjectDigest:
    # Flat first: of a single column torch keeps whatever stride it had.
    data = matrix.reshape(-1).view(torch.uint8).numpy().data
    return store.put_tensor("BF16", tuple(matrix.shape), data)


def _matrix(store: Store, digest: ObjectDigest) -> Tensor:
    return as_float(store.tensor(digest))


def as_float(stored: StoredTensor) -> Tensor:
    """A stored tensor as a float32 copy."""
    data = torch.frombuffer(bytearray(stored.data), dtype=_DTYPES[stored.dtype])
    return data.view(stored.shape).float()


def _bytes(store: Store, digests: Iterable[ObjectDigest]) -> int:
    return sum(store.info(digest).nbytes for digest in set(digests))
