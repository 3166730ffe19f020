"""Resident units: the weights of one unit in the form the kernels want, ready to run.

`build_unit` and `build_attachment` turn manifests into these through the three loaders that
`workers.residency` lends (matrix, vector, rotary); `workers.layers` runs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ext.ops import Activation, Attention, Linear, Matrix, Norm, Opaque
from zoo.manifest import (
    Attachment,
    AttentionSpec,
    EmbedSpec,
    HeadSpec,
    MlpSpec,
    ObjectDigest,
    ParallelSpec,
    Rope,
    Unit,
)
from zoo.manifest import LowRank as LowRankPiece
from zoo.manifest import Norm as NormSpec


class Loaders(Protocol):
    """Where a unit's tensors come from."""

    def matrix(self, digest: ObjectDigest, transposed: bool) -> Matrix: ...

    def vector(self, digest: ObjectDigest, offset: float) -> Tensor: ...

    def rotary(self, rope: Rope) -> Opaque: ...


@dataclass(frozen=True, slots=True)
class EmbedUnit:
    """Token table and learned positions."""

    tokens: Matrix
    positions: Matrix | None
    scale: float
    offset: int


@dataclass(frozen=True, slots=True)
class AttentionUnit:
    """`inputs` are q, k, v, or one fused linear; `roles` name them as attachments do. A fused
    output is `groups` times q, k, v of `widths`. `post_norm` is for what is added."""

    norm: Norm
    inputs: tuple[Linear, ...]
    roles: tuple[str, ...]
    output: Linear
    groups: int
    widths: tuple[int, int, int]
    attention: Attention
    post_norm: Norm | None


@dataclass(frozen=True, slots=True)
class MlpUnit:
    """`inputs` are gate and up, up alone, or (`fused`) one linear for gate and up. `post_norm` is
    for what is added."""

    norm: Norm
    inputs: tuple[Linear, ...]
    roles: tuple[str, ...]
    output: Linear
    activation: Activation
    fused: bool
    post_norm: Norm | None


@dataclass(frozen=True, slots=True)
class ParallelUnit:
    """Attention and MLP of a layer that both read its input."""

    attention: AttentionUnit
    mlp: MlpUnit


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """Final norm and output matrix."""

    norm: Norm
    output: Linear


ResidentUnit = EmbedUnit | AttentionUnit | MlpUnit | ParallelUnit | HeadUnit


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B(A(x)): A [rank, in], B [out, rank], float32."""

    a: Tensor
    b: Tensor
    scale: float


ResidentAttachment = Mapping[str, LowRank]


def build_unit(unit: Unit, loaders: Loaders) -> ResidentUnit:
    """Make a unit resident."""
    builder = _Builder(unit, loaders)
    match unit.spec:
        case EmbedSpec() as spec:
            positions = builder.matrix("positions.weight") if builder.has("positions") else None
            return EmbedUnit(
                builder.matrix("tokens.weight"), positions, spec.scale, spec.position_offset
            )
        case AttentionSpec() as spec:
            return _attention(builder, spec)
        case MlpSpec() as spec:
            return _mlp(builder, spec, builder.norm("norm", spec.norm))
        case ParallelSpec() as spec:
            mlp_norm = builder.norm("mlp_norm", spec.mlp.norm)
            return ParallelUnit(
                _attention(builder, spec.attention), _mlp(builder, spec.mlp, mlp_norm)
            )
        case HeadSpec() as spec:
            return HeadUnit(builder.norm("norm", spec.norm), builder.linear("head", False))


def _attention(builder: "_Builder", spec: AttentionSpec) -> AttentionUnit:
    roles = ("qkv",) if spec.fused else ("q", "k", "v")
    qk = spec.qk_norm
    groups = spec.kv_heads if spec.grouped else 1
    kv = spec.kv_heads * spec.head_dim // groups
    return AttentionUnit(
        norm=builder.norm("norm", spec.norm),
        inputs=tuple(builder.linear(r, spec.transposed) for r in roles),
        roles=roles,
        output=builder.linear("o", spec.transposed),
        groups=groups,
        widths=(spec.heads * spec.head_dim // groups, kv, kv),
        attention=Attention(
            scale=spec.scale,
            rotary=None if spec.rope is None else builder.loaders.rotary(spec.rope),
            q_norm=None if qk is None else builder.norm("q_norm", qk),
            k_norm=None if qk is None else builder.norm("k_norm", qk),
            window=spec.window,
        ),
        post_norm=builder.post_norm(spec.post_norm),
    )


def _mlp(builder: "_Builder", spec: MlpSpec, norm: Norm) -> MlpUnit:
    roles = ("gate_up",) if spec.fused else ("gate", "up") if spec.gated else ("up",)
    return MlpUnit(
        norm=norm,
        inputs=tuple(builder.linear(r, spec.transposed) for r in roles),
        roles=roles,
        output=builder.linear("down", spec.transposed),
        activation=spec.activation,
        fused=spec.fused,
        post_norm=builder.post_norm(spec.post_norm),
    )


def build_attachment(attachment: Attachment, loaders: Loaders) -> ResidentAttachment:
    """Make a LoRA's pieces on one unit resident: role -> its two matrices."""
    return {
        t.role: LowRank(loaders.vector(t.a, 0.0), loaders.vector(t.b, 0.0), t.scale)
        for t in attachment.pieces
        if isinstance(t, LowRankPiece)
    }


class _Builder:
    """Reads the tensors of one unit by role."""

    def __init__(self, unit: Unit, loaders: Loaders) -> None:
        self._tensors = unit.tensors
        self.loaders = loaders

    def has(self, role: str) -> bool:
        return f"{role}.weight" in self._tensors

    def matrix(self, name: str, transposed: bool = False) -> Matrix:
        return self.loaders.matrix(self._tensors[name], transposed)

    def linear(self, role: str, transposed: bool) -> Linear:
        bias = self._tensors.get(f"{role}.bias")
        return Linear(
            self.matrix(f"{role}.weight", transposed),
            None if bias is None else self.loaders.vector(bias, 0.0),
        )

    def norm(self, role: str, spec: NormSpec) -> Norm:
        bias = self._tensors.get(f"{role}.bias")
        return Norm(
            spec.kind,
            spec.eps,
            self.loaders.vector(self._tensors[f"{role}.weight"], spec.offset),
            None if bias is None else self.loaders.vector(bias, 0.0),
        )

    def post_norm(self, spec: NormSpec | None) -> Norm | None:
        return None if spec is None else self.norm("post_norm", spec)
