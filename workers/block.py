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
    Rope,
    Unit,
)
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
    """`inputs` are q, k, v, or one fused linear; `roles` name them as attachments do."""

    norm: Norm
    inputs: tuple[Linear, ...]
    roles: tuple[str, ...]
    output: Linear
    widths: tuple[int, int, int]
    attention: Attention


@dataclass(frozen=True, slots=True)
class MlpUnit:
    """`inputs` are gate and up, or up alone."""

    norm: Norm
    inputs: tuple[Linear, ...]
    roles: tuple[str, ...]
    output: Linear
    activation: Activation


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """Final norm and output matrix."""

    norm: Norm
    output: Linear


ResidentUnit = EmbedUnit | AttentionUnit | MlpUnit | HeadUnit


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
            roles = ("gate", "up") if spec.gated else ("up",)
            inputs = tuple(builder.linear(r, spec.transposed) for r in roles)
            down = builder.linear("down", spec.transposed)
            return MlpUnit(builder.norm("norm", spec.norm), inputs, roles, down, spec.activation)
        case HeadSpec() as spec:
            return HeadUnit(builder.norm("norm", spec.norm), builder.linear("head", False))


def _attention(builder: "_Builder", spec: AttentionSpec) -> AttentionUnit:
    roles = ("qkv",) if spec.fused else ("q", "k", "v")
    qk = spec.qk_norm
    kv = spec.kv_heads * spec.head_dim
    return AttentionUnit(
        norm=builder.norm("norm", spec.norm),
        inputs=tuple(builder.linear(r, spec.transposed) for r in roles),
        roles=roles,
        output=builder.linear("o", spec.transposed),
        widths=(spec.heads * spec.head_dim, kv, kv),
        attention=Attention(
            scale=spec.scale,
            rotary=None if spec.rope is None else builder.loaders.rotary(spec.rope),
            q_norm=None if qk is None else builder.norm("q_norm", qk),
            k_norm=None if qk is None else builder.norm("k_norm", qk),
            window=spec.window,
        ),
    )


def build_attachment(attachment: Attachment, loaders: Loaders) -> ResidentAttachment:
    """Make a LoRA's pieces on one unit resident: role -> its two matrices."""
    return {
        t.role: LowRank(loaders.vector(t.a, 0.0), loaders.vector(t.b, 0.0), t.scale)
        for t in attachment.targets
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
