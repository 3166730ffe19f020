"""What the zoo says about weights: units, attachments, chains and variants, each named by a digest.

Owned by the zoo, read by the engine and the workers. No torch here: manifests are small, typed and
portable. A digest is the SHA-256 (hex) of the canonical JSON of the thing it names, so equal
content has one name wherever it was made. Specs leave out what stands at its default, so a field
that a later family needs does not rename the units of the others."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, NewType

import msgspec

from zoo.measured import Measured

ObjectDigest = NewType("ObjectDigest", str)
UnitDigest = NewType("UnitDigest", str)
AttachmentDigest = NewType("AttachmentDigest", str)
ChainDigest = NewType("ChainDigest", str)

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Store = Literal["exact", "delta", "equivalent"]


class Norm(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A normalization over the last axis. `offset` is added to the stored weight (Gemma: 1)."""

    kind: NormKind
    eps: float
    offset: float = 0.0


class Rope(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rotary positions of an attention unit.

    `inverse_frequencies` are the final ones (radians per position, float64, one per rotated pair),
    so every scaling rule (linear, llama3, yarn) is settled at import and the worker only
    multiplies. `attention_factor` multiplies cos and sin (yarn); `interleaved` pairs (0,1),(2,3)..
    instead of halves. The rotated width is `2 * len(inverse_frequencies)`; the rest of the head
    passes through."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    interleaved: bool = False


class EmbedSpec(
    msgspec.Struct, frozen=True, tag="embed", omit_defaults=True, forbid_unknown_fields=True
):
    """Token (and learned position) embedding. Roles: tokens.weight, positions.weight."""

    hidden: int
    vocabulary: int
    scale: float = 1.0
    position_offset: int = 0


class AttentionSpec(
    msgspec.Struct, frozen=True, tag="attention", omit_defaults=True, forbid_unknown_fields=True
):
    """An attention half-layer: x += O(attend(Q, K, V of norm(x))).

    Roles: norm.{weight,bias}; q,k,v or one fused qkv .{weight,bias}; o.{weight,bias};
    q_norm.weight, k_norm.weight where `qk_norm`; post_norm.{weight,bias} where `post_norm`, which
    norms what is added. `transposed` says that matrices lie as [in, out]. The outputs of a fused
    qkv are all of q, of k, of v; where `grouped`, for each KV head its own q, k, v.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: Norm
    scale: float
    rope: Rope | None = None
    qk_norm: Norm | None = None
    fused: bool = False
    transposed: bool = False
    window: int | None = None
    grouped: bool = False
    post_norm: Norm | None = None


class MlpSpec(
    msgspec.Struct, frozen=True, tag="mlp", omit_defaults=True, forbid_unknown_fields=True
):
    """An MLP half-layer: x += down(act(gate(n)) * up(n)) or down(act(up(n))), n = norm(x).

    Roles: norm.{weight,bias}; gate, up, down .{weight,bias}; `gated` says whether gate exists,
    `fused` that gate and up are one gate_up, gate first. post_norm.{weight,bias} where `post_norm`,
    which norms what is added.
    """

    hidden: int
    intermediate: int
    norm: Norm
    activation: Activation
    gated: bool = True
    transposed: bool = False
    fused: bool = False
    post_norm: Norm | None = None


class ParallelSpec(
    msgspec.Struct, frozen=True, tag="parallel", omit_defaults=True, forbid_unknown_fields=True
):
    """A whole layer whose halves both read its input: x += attention(x) + mlp(x).

    One unit, so that nothing ever parts the halves. Roles: those of both, but for the MLP's norm,
    which is mlp_norm.{weight,bias}. Neither half has a post_norm, and their matrices lie alike.
    """

    attention: AttentionSpec
    mlp: MlpSpec

    @property
    def transposed(self) -> bool:
        """Whether matrices lie as [in, out]."""
        return self.attention.transposed


class HeadSpec(
    msgspec.Struct, frozen=True, tag="head", omit_defaults=True, forbid_unknown_fields=True
):
    """Final norm and output head: logits = scale * W norm(x). Roles: norm.{weight,bias} (absent: a
    norm without weights), head.{weight,bias}."""

    hidden: int
    vocabulary: int
    norm: Norm
    scale: float = 1.0


class ForeignSpec(
    msgspec.Struct, frozen=True, tag="foreign", omit_defaults=True, forbid_unknown_fields=True
):
    """A whole layer that transformers' own class computes, but for its linear layers and its
    attention over pages, which are ours.

    Roles: the layer's parameters under their own names within it; those of `linears` + ".weight"
    and ".bias" are linear layers and can carry low-rank pieces, gains and biases. `config` is what
    the model's config says that bears on its layers, as canonical JSON; `layer` counts from 0.
    `scale` and `window` are those of the attention. It gives each of the `kv_heads` `copies`
    times, one of which is kept.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    config: str
    layer: int
    linears: tuple[str, ...]
    window: int | None = None
    copies: int = 1


class StitchSpec(
    msgspec.Struct, frozen=True, tag="stitch", omit_defaults=True, forbid_unknown_fields=True
):
    """From a stream of `hidden` channels to one of `width`: x = W x + b + t[bucket(position)].

    Roles: map.{weight,bias}; positions.weight is t, [buckets, width]. Position 0 has a bucket of
    its own, the others share one by their power of two: 1, 2-3, 4-7 ...; the last takes the rest.
    """

    hidden: int
    width: int
    buckets: int


Spec = EmbedSpec | AttentionSpec | MlpSpec | ParallelSpec | ForeignSpec | StitchSpec | HeadSpec


def attention_of(spec: Spec) -> AttentionSpec | ForeignSpec | None:
    """The attention within a unit, if it has one."""
    if isinstance(spec, ParallelSpec):
        return spec.attention
    return spec if isinstance(spec, AttentionSpec | ForeignSpec) else None


class Unit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The smallest stored piece of weights: its arithmetic and its tensors (role -> object)."""

    spec: Spec
    tensors: dict[str, ObjectDigest]


class LowRank(msgspec.Struct, frozen=True, tag="low_rank", forbid_unknown_fields=True):
    """y += scale * B(A(x)) on the linear `role` of a unit; A is [rank, in], B is [out, rank].

    On the role "tokens" of an embedding: x(t) += scale * B A[:, t], in = vocabulary."""

    role: str
    a: ObjectDigest
    b: ObjectDigest
    rank: int
    scale: float


class Gain(msgspec.Struct, frozen=True, tag="gain", forbid_unknown_fields=True):
    """y = vector * (W x + low-rank pieces), before the bias is added; vector is [out]. DoRA's
    magnitudes over norms, IA3's vectors on keys and values."""

    role: str
    vector: ObjectDigest


class InputGain(msgspec.Struct, frozen=True, tag="input_gain", forbid_unknown_fields=True):
    """The output linear `role` ("o" or "down") reads vector * x; vector is [in]. IA3 on MLPs."""

    role: str
    vector: ObjectDigest


class Bias(msgspec.Struct, frozen=True, tag="bias", forbid_unknown_fields=True):
    """A bias [out] in place of the linear's own, if it has one."""

    role: str
    vector: ObjectDigest


class NormWeights(
    msgspec.Struct, frozen=True, tag="norm", omit_defaults=True, forbid_unknown_fields=True
):
    """Weights in place of the norm `role` of a unit (norm, mlp_norm, q_norm, k_norm, post_norm), as
    a checkpoint stores them: the unit's own offset is still added."""

    role: str
    weight: ObjectDigest
    bias: ObjectDigest | None = None


class Bottleneck(
    msgspec.Struct, frozen=True, tag="bottleneck", omit_defaults=True, forbid_unknown_fields=True
):
    """A small MLP beside or behind the output linear `role` ("o" or "down") of a half-layer.

    With y what the half-layer adds to the stream x: x += y + scale * up(act(down(z))), where z is
    what it `reads`: "output": y; "stream": x + y; "input": x; "norm": norm(x) of the half-layer.
    down is [size, hidden], up is [hidden, size]."""

    role: str
    down: ObjectDigest
    up: ObjectDigest
    activation: Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "none"]
    reads: Literal["output", "stream", "input", "norm"] = "output"
    scale: float = 1.0
    down_bias: ObjectDigest | None = None
    up_bias: ObjectDigest | None = None


class Prefix(msgspec.Struct, frozen=True, tag="prefix", forbid_unknown_fields=True):
    """Keys and values [length, kv_heads, head_dim] that stand before the first token in one
    attention layer; they take the positions 0 .. length - 1, and keys are not rotated."""

    keys: ObjectDigest
    values: ObjectDigest
    length: int


class SoftPrompt(msgspec.Struct, frozen=True, tag="soft_prompt", forbid_unknown_fields=True):
    """Vectors [length, hidden] that stand before the first token's embedding and take the positions
    0 .. length - 1; the embedding's scale does not apply to them, learned positions do."""

    vectors: ObjectDigest
    length: int


class TokenRows(msgspec.Struct, frozen=True, tag="token_rows", forbid_unknown_fields=True):
    """Rows of the embedding ("tokens") or of the head ("head") in place of the table's own: `ids`
    are I64 [n], ascending; `rows` [n, hidden]. Ids may lie beyond the table (added tokens)."""

    role: str
    ids: ObjectDigest
    rows: ObjectDigest


Piece = (
    LowRank | Gain | InputGain | Bias | NormWeights | Bottleneck | Prefix | SoftPrompt | TokenRows
)


class Attachment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one variant has upon one unit, applied to its own rows inside the shared batch. Of one
    type and role there is at most one piece, but for low-rank ones, which add up."""

    pieces: tuple[Piece, ...]


def objects_of(attachment: Attachment) -> list[ObjectDigest]:
    """The tensors that an attachment names."""
    found: list[ObjectDigest] = []
    for piece in attachment.pieces:
        match piece:
            case LowRank(a=a, b=b):
                found += (a, b)
            case Gain(vector=vector) | InputGain(vector=vector) | Bias(vector=vector):
                found.append(vector)
            case NormWeights(weight=weight, bias=bias):
                found += (weight, bias) if bias else (weight,)
            case Bottleneck(down=down, up=up, down_bias=inner, up_bias=outer):
                found += (d for d in (down, up, inner, outer) if d)
            case Prefix(keys=keys, values=values):
                found += (keys, values)
            case SoftPrompt(vectors=vectors):
                found.append(vectors)
            case TokenRows(ids=ids, rows=rows):
                found += (ids, rows)
    return found


def virtual_tokens(attachments: Iterable[Attachment | None]) -> int:
    """Positions that stand before a request's first token: the length of its prefix or prompt."""
    pieces = [p for a in attachments if a for p in a.pieces]
    return max((p.length for p in pieces if isinstance(p, Prefix | SoftPrompt)), default=0)


class Chain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ordered units of a variant and, beside each, its attachment or None (same length)."""

    units: tuple[UnitDigest, ...]
    attachments: tuple[AttachmentDigest | None, ...]


class Manifests(msgspec.Struct, frozen=True):
    """A chain written out, known to a catalog or not: its units and attachments, bottom first, and
    the longest sequence in tokens, virtual ones not counted, that will be asked of it."""

    units: Sequence[tuple[UnitDigest, Unit]]
    attachments: Sequence[tuple[AttachmentDigest, Attachment] | None]
    context: int


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that clients ask for by name.

    `kind` is what it is to its base: "base", "full" (most units its own), "partial", or of an
    adapter its type: "lora", "dora", "ia3", "prefix", "prompt", "tokens", "bottleneck", "norm",
    "bias", "sum", "merged:vera" and others that are merged.
    `files` maps file names (tokenizer.json, config.json, chat_template.jinja ...) to objects, and
    is what `export` writes beside the weights. `context` is the longest sequence in tokens. `eos`
    are the token ids that end an answer. `created` is in seconds since the epoch. `tensors` keeps
    the source's own names in their order (checkpoint name -> object) for export; for an adapter
    they are the adapter's tensors. `report` counts units by what became of them. `borrowed` are the
    names in `files` that it has from its base; export leaves them out. `measured` is there unless
    it is stored exactly, `bound` is the agreement that was asked of it. What is measured of a
    `private` variant is never kept beside what is another `tenant`'s. `golden` is the largest
    relative difference of its logits to the source's own; None where that was not looked at. A
    `dummy` has shapes and no weights: none of its tensors is in the store."""

    name: str
    chain: ChainDigest
    family: str
    kind: str
    store: Store
    base: str | None
    source: str
    created: float
    hidden: int
    vocabulary: int
    context: int
    dtype: str
    eos: tuple[int, ...]
    files: dict[str, ObjectDigest]
    tensors: dict[str, ObjectDigest]
    report: dict[str, int]
    borrowed: tuple[str, ...] = ()
    measured: Measured | None = None
    bound: float | None = None
    private: bool = False
    tenant: str = ""
    golden: float | None = None
    dummy: bool = False


_encoder = msgspec.json.Encoder(order="deterministic")


def canonical(value: object) -> bytes:
    """Canonical JSON of a manifest: fields in their order, keys of mappings sorted, no spaces."""
    return _encoder.encode(value)


def digest(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()
