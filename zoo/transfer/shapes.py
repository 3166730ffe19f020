"""Whether a publication's tensors have the shapes that its specs and its pieces ask for: what the
import of a checkpoint makes sure of, checked again on what was imported elsewhere."""

from collections.abc import Collection, Iterator, Mapping

from zoo.catalog import Publication
from zoo.errors import BadDelivery
from zoo.families.family import layer_sizes
from zoo.manifest import (
    Attachment,
    AttentionSpec,
    Bias,
    Bottleneck,
    EmbedSpec,
    Gain,
    HeadSpec,
    InputGain,
    LowRank,
    MlpSpec,
    NormWeights,
    ObjectDigest,
    ParallelSpec,
    Piece,
    Prefix,
    SoftPrompt,
    Spec,
    TokenRows,
    Unit,
    attention_of,
)
from zoo.store import ObjectInfo

Shape = tuple[int, ...]
Infos = Mapping[ObjectDigest, ObjectInfo]
_KNOWN = (EmbedSpec, AttentionSpec, MlpSpec, ParallelSpec, HeadSpec)
_FLOATS = ("F32", "BF16", "F16")
_INTEGERS = ("I64",)


class _Sizes:
    """Widths of a unit's norms, (out, in) of its linear layers, and how matrices lie."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.norms: Mapping[str, int] = {}
        self.linears: Mapping[str, tuple[int, int]] = {}
        self.is_transposed = False
        if isinstance(spec, EmbedSpec):
            self.linears = {"tokens": (spec.vocabulary, spec.hidden)}
        elif isinstance(spec, HeadSpec):
            self.norms = {"norm": spec.hidden}
            self.linears = {"head": (spec.vocabulary, spec.hidden)}
        elif isinstance(spec, AttentionSpec | MlpSpec | ParallelSpec):
            self.norms, self.linears = layer_sizes(spec)
            self.is_transposed = spec.transposed

    def shape(self, role: str) -> Shape | None:
        """What the tensor of a role must be; None for a role that the unit cannot have."""
        module, _, kind = role.rpartition(".")
        if module in self.norms and kind in {"weight", "bias"}:
            return (self.norms[module],)
        if module not in self.linears or kind not in {"weight", "bias"}:
            return None
        out, width = self.linears[module]
        if kind == "bias":
            return (out,)
        return (width, out) if self.is_transposed else (out, width)


def check_shapes(publication: Publication) -> None:
    """Raises BadDelivery for the first tensor that no worker could compute with. Units whose specs
    do not say their tensors are left to the worker."""
    infos = publication.objects
    chain = publication.chain
    for digest, attached in zip(chain.units, chain.attachments, strict=True):
        unit = publication.units[digest]
        if not isinstance(unit.spec, _KNOWN):
            continue
        _check_unit(unit, infos)
        if attached is not None:
            _check_attachment(unit, publication.attachments[attached], infos)


def _check_unit(unit: Unit, infos: Infos) -> None:
    sizes = _Sizes(unit.spec)
    for role, digest in unit.tensors.items():
        wanted = sizes.shape(role)
        if role == "positions.weight" and isinstance(unit.spec, EmbedSpec):
            wanted = (*infos[digest].shape[:1], unit.spec.hidden)
        if wanted is None:
            raise BadDelivery(f"a unit of it has a tensor {role!r}, which it cannot have")
        _check(role, infos[digest], wanted)


def _check_attachment(unit: Unit, attachment: Attachment, infos: Infos) -> None:
    sizes = _Sizes(unit.spec)
    for piece in attachment.pieces:
        kind = type(piece).__name__
        wanted = list(_wanted(piece, sizes, infos))
        if not wanted:
            raise BadDelivery(f"a unit of it has a {kind}, which it cannot have")
        for digest, shape in wanted:
            is_ids = isinstance(piece, TokenRows) and digest == piece.ids
            _check(kind, infos[digest], shape, _INTEGERS if is_ids else _FLOATS)


def _check(what: str, info: ObjectInfo, wanted: Shape, dtypes: Collection[str] = _FLOATS) -> None:
    if info.shape != wanted or info.dtype not in dtypes:
        raise BadDelivery(
            f"its {what} is {info.dtype} {list(info.shape)} instead of {list(wanted)}"
        )


def _wanted(piece: Piece, sizes: _Sizes, infos: Infos) -> Iterator[tuple[ObjectDigest, Shape]]:
    """The shapes of a piece's tensors; none for a piece that the unit cannot have."""
    match piece:
        case Prefix():
            yield from _prefix(piece, sizes.spec)
        case SoftPrompt(vectors=vectors, length=length) if isinstance(sizes.spec, EmbedSpec):
            yield vectors, (length, sizes.spec.hidden)
        case TokenRows(ids=ids, rows=rows) if isinstance(sizes.spec, EmbedSpec | HeadSpec):
            count = infos[ids].shape[:1]
            yield from ((ids, count), (rows, (*count, sizes.spec.hidden)))
        case NormWeights(role=role, weight=weight, bias=bias) if role in sizes.norms:
            yield weight, (sizes.norms[role],)
            if bias:
                yield bias, (sizes.norms[role],)
        case LowRank() | Gain() | InputGain() | Bias() | Bottleneck():
            if piece.role in sizes.linears:
                yield from _on_linear(piece, sizes.linears[piece.role], infos)
        case _:
            return


def _on_linear(
    piece: LowRank | Gain | InputGain | Bias | Bottleneck, linear: tuple[int, int], infos: Infos
) -> Iterator[tuple[ObjectDigest, Shape]]:
    out, width = linear
    match piece:
        case LowRank(role="tokens", a=a, b=b, rank=rank):
            # A table of rows is read by token: its inputs are the tokens.
            yield from ((a, (rank, out)), (b, (width, rank)))
        case LowRank(a=a, b=b, rank=rank):
            yield from ((a, (rank, width)), (b, (out, rank)))
        case Gain(vector=vector) | Bias(vector=vector):
            yield vector, (out,)
        case InputGain(vector=vector):
            yield vector, (width,)
        case Bottleneck(down=down, up=up, down_bias=inner, up_bias=outer):
            size = infos[down].shape[:1]
            yield from ((down, (*size, out)), (up, (out, *size)))
            yield from ((bias, shape) for bias, shape in ((inner, size), (outer, (out,))) if bias)


def _prefix(piece: Prefix, spec: Spec) -> Iterator[tuple[ObjectDigest, Shape]]:
    attention = attention_of(spec)
    if attention is not None:
        shape = (piece.length, attention.kv_heads, attention.head_dim)
        yield from ((piece.keys, shape), (piece.values, shape))
