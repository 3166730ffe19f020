"""Resident attachments: what one variant has upon one unit, in the form the kernels want.

`build_attachment` makes them of manifests through the loaders that `workers.loading` lends, and
checks each piece against the unit it is put upon; `workers.attachments` arranges them for
batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor

from ext.ops import Linear, Matrix, Prepared
from workers.block import EmbedUnit, HeadUnit, Loaders, ResidentUnit, norm_specs
from workers.chains import UnservableChain
from zoo import manifest
from zoo.manifest import Attachment, ObjectDigest, Unit, attention_of

Reads = Literal["output", "stream", "input", "norm"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B(A(x)): A [rank, in], B [out, rank]."""

    role: str
    a: Tensor
    b: Tensor
    scale: float
    prepared: Prepared = field(default_factory=Prepared)


@dataclass(frozen=True, slots=True)
class Gain:
    """What a linear's output is multiplied by, before its bias; [out]."""

    role: str
    vector: Tensor


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias in place of the linear's own; [out]."""

    role: str
    vector: Tensor


@dataclass(frozen=True, slots=True)
class InputGain:
    """What a linear's input is multiplied by; [in]."""

    role: str
    vector: Tensor


@dataclass(frozen=True, slots=True)
class NormPair:
    """A norm's weight, its family's offset added, and its bias (None: the norm's own)."""

    role: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Bypass:
    """A bottleneck adapter beside an output linear, and what it reads."""

    role: str
    reads: Reads
    down: Linear
    up: Linear
    activation: Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "none"]
    scale: float


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values [length, kv_heads, head_dim] as they go into pages."""

    role: str
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of the head in place of the table's own, and what else the variant has upon them;
    `width` is one more than the last id."""

    role: str
    ids: Tensor
    linear: Linear
    low_rank: tuple[LowRank, ...]
    gain: Tensor | None
    bias: Tensor | None
    width: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """The vectors of the tokens -1, -2, ... as a table [length, hidden]."""

    role: str
    table: Matrix


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of the embedding in place of the table's own: `ids` int64, ascending."""

    role: str
    ids: Tensor
    table: Matrix


@dataclass(frozen=True, slots=True)
class TokenLowRank:
    """x(t) += scale * B A[:, t]: `table` is A by tokens [tokens, rank], `up` is B."""

    role: str
    table: Matrix
    up: Linear
    scale: float


ResidentPiece = (
    LowRank
    | Gain
    | Bias
    | InputGain
    | NormPair
    | Bypass
    | Prefix
    | HeadRows
    | Prompt
    | TokenRows
    | TokenLowRank
)
Kind = TypeVar("Kind", bound=ResidentPiece)


class ResidentAttachment:
    """Pieces by their kind and the role of the linear, norm or table that they are for."""

    def __init__(self, pieces: Sequence[ResidentPiece]) -> None:
        self.kinds = frozenset(type(piece) for piece in pieces)
        self._pieces: dict[tuple[type[ResidentPiece], str], list[ResidentPiece]] = {}
        for piece in pieces:
            self._pieces.setdefault((type(piece), piece.role), []).append(piece)

    def all(self, kind: type[Kind], role: str) -> Sequence[Kind]:
        """Every piece of a kind for a role: only low-rank ones may be several."""
        return self._pieces.get((kind, role), ())  # pyright: ignore[reportReturnType]

    def one(self, kind: type[Kind], role: str) -> Kind | None:
        """The piece of a kind for a role, if there is one."""
        return next(iter(self.all(kind, role)), None)


def build_attachment(
    attachment: Attachment, unit: Unit, resident: ResidentUnit, loaders: Loaders
) -> ResidentAttachment:
    """Make resident what is put upon `unit`; raises UnservableChain where it does not fit."""
    ground = _Ground(unit, resident, loaders)
    pieces = [made for piece in attachment.pieces if (made := _piece(piece, ground)) is not None]
    rows = next((p for p in attachment.pieces if isinstance(p, manifest.TokenRows)), None)
    if rows is not None and isinstance(resident, HeadUnit):
        pieces.append(_head_rows(rows, attachment, ResidentAttachment(pieces), ground))
    return ResidentAttachment(pieces)


@dataclass(frozen=True, slots=True)
class _Ground:
    """The unit that pieces are put upon; checks that they fit it and loads their tensors."""

    unit: Unit
    resident: ResidentUnit
    loaders: Loaders

    def linear(self, role: str) -> Linear:
        found = self.resident.linears.get(role)
        if found is None:
            raise UnservableChain(f"a piece is for {role!r}, which no linear of its unit is called")
        return found

    def output(self, role: str) -> Linear:
        if role not in {"o", "down"}:
            raise UnservableChain(f"a piece is for {role!r}, which is no output linear")
        return self.linear(role)

    def checked(self, tensor: ObjectDigest, *shape: int) -> ObjectDigest:
        found = self.loaders.shape(tensor)
        if found != shape:
            raise UnservableChain(f"tensor {tensor} of a piece is {found}, {shape} is needed")
        return tensor

    def vector(self, tensor: ObjectDigest, *shape: int) -> Tensor:
        return self.loaders.vector(self.checked(tensor, *shape), 0.0)

    def matrix(self, tensor: ObjectDigest, *shape: int, transposed: bool = False) -> Matrix:
        return self.loaders.matrix(self.checked(tensor, *shape), transposed)

    def factor(self, tensor: ObjectDigest, *shape: int) -> Tensor:
        return self.loaders.factor(self.checked(tensor, *shape))


def _piece(piece: manifest.Piece, on: _Ground) -> ResidentPiece | None:
    """A resident piece; None for rows of the head, which need the others beside them."""
    match piece:
        case manifest.LowRank():
            return _low_rank(piece, on)
        case manifest.Gain(role=role, vector=vector):
            return Gain(role, on.vector(vector, on.linear(role).weight.out_features))
        case manifest.Bias(role=role, vector=vector):
            return Bias(role, on.vector(vector, on.linear(role).weight.out_features))
        case manifest.InputGain(role=role, vector=vector):
            return InputGain(role, on.vector(vector, on.output(role).weight.in_features))
        case manifest.NormWeights():
            return _norm_pair(piece, on)
        case manifest.Bottleneck():
            return _bypass(piece, on)
        case _:
            return _positions_piece(piece, on)


def _positions_piece(
    piece: manifest.Prefix | manifest.SoftPrompt | manifest.TokenRows, on: _Ground
) -> ResidentPiece | None:
    """Pieces that depend on the token or the position that a row holds."""
    attention = attention_of(on.unit.spec)
    match piece:
        case manifest.Prefix(keys=keys, values=values, length=n) if attention is not None:
            shape = (n, attention.kv_heads, attention.head_dim)
            return Prefix("", on.vector(keys, *shape), on.vector(values, *shape))
        case manifest.SoftPrompt(vectors=vectors, length=n) if isinstance(on.resident, EmbedUnit):
            return Prompt("tokens", on.matrix(vectors, n, on.resident.hidden))
        case manifest.TokenRows(ids=ids, rows=rows) if isinstance(on.resident, EmbedUnit):
            known = on.loaders.ids(ids)
            return TokenRows("tokens", known, on.matrix(rows, len(known), on.resident.hidden))
        case manifest.TokenRows() if isinstance(on.resident, HeadUnit):
            return None
        case _:
            name, unit = (type(x).__name__ for x in (piece, on.unit.spec))
            raise UnservableChain(f"a {name} piece cannot stand upon a unit of {unit}")


def _low_rank(piece: manifest.LowRank, on: _Ground) -> LowRank | TokenLowRank:
    rank, role = piece.rank, piece.role
    if isinstance(on.resident, EmbedUnit):
        table, hidden = on.resident.tokens.out_features, on.resident.hidden
        if role != "tokens":
            raise UnservableChain(f"a low-rank piece upon an embedding is for {role!r}")
        a = on.matrix(piece.a, rank, table, transposed=True)
        return TokenLowRank(role, a, Linear(on.matrix(piece.b, hidden, rank)), piece.scale)
    weight = on.linear(role).weight
    a = on.factor(piece.a, rank, weight.in_features)
    return LowRank(role, a, on.factor(piece.b, weight.out_features, rank), piece.scale)


def _norm_pair(piece: manifest.NormWeights, on: _Ground) -> NormPair:
    spec = norm_specs(on.unit.spec).get(piece.role)
    own = on.resident.norms.get(piece.role)
    if spec is None or own is None:
        raise UnservableChain(f"a norm piece is for {piece.role!r}, which its unit has not")
    weight = on.loaders.vector(on.checked(piece.weight, *own.weight.shape), spec.offset)
    bias = None if piece.bias is None else on.vector(piece.bias, *own.weight.shape)
    return NormPair(piece.role, weight, bias)


def _bypass(piece: manifest.Bottleneck, on: _Ground) -> Bypass:
    hidden = on.output(piece.role).weight.out_features
    size = on.loaders.shape(piece.down)[0]
    inner, outer = piece.down_bias, piece.up_bias
    return Bypass(
        role=piece.role,
        reads=piece.reads,
        down=Linear(
            on.matrix(piece.down, size, hidden), None if inner is None else on.vector(inner, size)
        ),
        up=Linear(
            on.matrix(piece.up, hidden, size), None if outer is None else on.vector(outer, hidden)
        ),
        activation=piece.activation,
        scale=piece.scale,
    )


def _head_rows(
    piece: manifest.TokenRows, attachment: Attachment, others: ResidentAttachment, on: _Ground
) -> HeadRows:
    """Rows of the head, with what the variant's other pieces mean for those ids."""
    head, ids = on.linear("head"), on.loaders.ids(piece.ids)
    inside = ids < head.weight.out_features

    def chosen(of: Tensor | None, beyond: float) -> Tensor | None:
        """Those ids' rows of a tensor over the table; ids that are not in it get `beyond`."""
        if of is None:
            return None
        rows = of.new_full((len(ids), *of.shape[1:]), beyond)
        rows[inside] = of[ids[inside]]
        return rows

    low_rank: list[LowRank] = []
    for low in (p for p in attachment.pieces if isinstance(p, manifest.LowRank)):
        b = chosen(on.loaders.tensor(low.b), 0.0)
        assert b is not None
        a = on.factor(low.a, low.rank, head.weight.in_features)
        low_rank.append(LowRank("head", a, on.loaders.ops.factor(b), low.scale))
    gain, bias = others.one(Gain, "head"), others.one(Bias, "head")
    return HeadRows(
        role="head",
        ids=ids,
        linear=Linear(on.matrix(piece.rows, len(ids), head.weight.in_features)),
        low_rank=tuple(low_rank),
        gain=chosen(gain and gain.vector, 1.0),
        bias=chosen(bias.vector if bias else head.bias, 0.0),
        width=int(ids.max()) + 1,
    )
