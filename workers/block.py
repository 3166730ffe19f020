"""Resident units: the weights of one unit in the form the kernels want, ready to run.

`build_unit` turns manifests into these through the loaders that `workers.loading` lends;
`workers.layers` runs them. A unit knows its `linears` and `norms` by the roles under which
attachments name them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ext.ops import Activation, Attention, Linear, Matrix, Norm, Opaque, Ops
from workers.foreign import ForeignUnit, build_foreign
from zoo.manifest import (
    AttentionSpec,
    EmbedSpec,
    ForeignSpec,
    HeadSpec,
    MlpSpec,
    ObjectDigest,
    ParallelSpec,
    Rope,
    Spec,
    StitchSpec,
    Unit,
)
from zoo.manifest import Norm as NormSpec


class Loaders(Protocol):
    """Where the tensors of units and attachments come from. All but `shape` and `tensor` are in the
    kernels' form and shared by digest."""

    @property
    def ops(self) -> Ops: ...

    def shape(self, digest: ObjectDigest) -> tuple[int, ...]: ...

    def tensor(self, digest: ObjectDigest) -> Tensor: ...

    def matrix(self, digest: ObjectDigest, transposed: bool) -> Matrix: ...

    def weight(self, name: str, digest: ObjectDigest, transposed: bool) -> Matrix: ...

    def vector(self, digest: ObjectDigest, offset: float) -> Tensor: ...

    def factor(self, digest: ObjectDigest) -> Tensor: ...

    def ids(self, digest: ObjectDigest) -> Tensor: ...

    def rotary(self, rope: Rope) -> Opaque: ...


@dataclass(frozen=True, slots=True)
class EmbedUnit:
    """Token table and learned positions."""

    tokens: Matrix
    positions: Matrix | None
    scale: float
    offset: int

    @property
    def hidden(self) -> int:
        return self.tokens.in_features

    @property
    def linears(self) -> dict[str, Linear]:
        return {}

    @property
    def norms(self) -> dict[str, Norm]:
        return {}


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

    @property
    def linears(self) -> dict[str, Linear]:
        return dict(zip(self.roles, self.inputs, strict=True)) | {"o": self.output}

    @property
    def norms(self) -> dict[str, Norm]:
        how = self.attention
        found = {"q_norm": how.q_norm, "k_norm": how.k_norm, "post_norm": self.post_norm}
        return {"norm": self.norm} | {role: norm for role, norm in found.items() if norm}

    def with_norms(self, norms: Mapping[str, Norm]) -> "AttentionUnit":
        """The same weights under other norms, by role."""
        how = self.attention
        return replace(
            self,
            norm=norms.get("norm", self.norm),
            attention=replace(
                how,
                q_norm=norms.get("q_norm", how.q_norm),
                k_norm=norms.get("k_norm", how.k_norm),
            ),
            post_norm=norms.get("post_norm", self.post_norm),
        )


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

    @property
    def linears(self) -> dict[str, Linear]:
        return dict(zip(self.roles, self.inputs, strict=True)) | {"down": self.output}

    @property
    def norms(self) -> dict[str, Norm]:
        return {"norm": self.norm} | ({"post_norm": self.post_norm} if self.post_norm else {})

    def with_norms(self, norms: Mapping[str, Norm]) -> "MlpUnit":
        """The same weights under other norms, by role."""
        return replace(
            self,
            norm=norms.get("norm", self.norm),
            post_norm=norms.get("post_norm", self.post_norm),
        )


@dataclass(frozen=True, slots=True)
class ParallelUnit:
    """Attention and MLP of a layer that both read its input."""

    attention: AttentionUnit
    mlp: MlpUnit

    @property
    def linears(self) -> dict[str, Linear]:
        return self.attention.linears | self.mlp.linears

    @property
    def norms(self) -> dict[str, Norm]:
        return self.attention.norms | {"mlp_norm": self.mlp.norm}

    def with_norms(self, norms: Mapping[str, Norm]) -> "ParallelUnit":
        """The same weights under other norms, by role."""
        own = {"norm": norms["mlp_norm"]} if "mlp_norm" in norms else {}
        return ParallelUnit(self.attention.with_norms(norms), self.mlp.with_norms(own))


@dataclass(frozen=True, slots=True)
class StitchUnit:
    """A map to a stream of another width; `positions` [buckets, width] float32 is added by where a
    row stands."""

    map: Linear
    positions: Tensor

    @property
    def linears(self) -> dict[str, Linear]:
        return {"map": self.map}

    @property
    def norms(self) -> dict[str, Norm]:
        return {}

    def with_norms(self, norms: Mapping[str, Norm]) -> "StitchUnit":
        """Itself: it has none."""
        assert not norms
        return self


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """Final norm and output matrix; logits are multiplied by `scale`."""

    norm: Norm
    output: Linear
    scale: float

    @property
    def linears(self) -> dict[str, Linear]:
        return {"head": self.output}

    @property
    def norms(self) -> dict[str, Norm]:
        return {"norm": self.norm}

    def with_norms(self, norms: Mapping[str, Norm]) -> "HeadUnit":
        """The same weights under other norms, by role."""
        return replace(self, norm=norms.get("norm", self.norm))


ResidentUnit = (
    EmbedUnit | AttentionUnit | MlpUnit | ParallelUnit | ForeignUnit | StitchUnit | HeadUnit
)


def norm_specs(spec: Spec) -> dict[str, NormSpec]:
    """What a unit's norms are, by role."""
    match spec:
        case AttentionSpec() | MlpSpec():
            qk = spec.qk_norm if isinstance(spec, AttentionSpec) else None
            found = {"norm": spec.norm, "q_norm": qk, "k_norm": qk, "post_norm": spec.post_norm}
            return {role: norm for role, norm in found.items() if norm}
        case ParallelSpec():
            return norm_specs(spec.attention) | {"mlp_norm": spec.mlp.norm}
        case HeadSpec():
            return {"norm": spec.norm}
        case _:
            return {}


def build_unit(unit: Unit, loaders: Loaders) -> ResidentUnit:
    """Make a unit resident."""
    builder = _Builder(unit, loaders)
    match unit.spec:
        case EmbedSpec() as spec:
            positions = builder.table("positions.weight") if builder.has("positions") else None
            return EmbedUnit(
                builder.table("tokens.weight"), positions, spec.scale, spec.position_offset
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
        case ForeignSpec() as spec:
            return build_foreign(unit, spec, loaders)
        case StitchSpec():
            positions = loaders.vector(unit.tensors["positions.weight"], 0.0)
            return StitchUnit(builder.linear("map", False), positions)
        case HeadSpec() as spec:
            norm = builder.norm("norm", spec.norm, spec.hidden)
            return HeadUnit(norm, builder.linear("head", False), spec.scale)


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


class _Builder:
    """Reads the tensors of one unit by role."""

    def __init__(self, unit: Unit, loaders: Loaders) -> None:
        self._tensors = unit.tensors
        self.loaders = loaders

    def has(self, role: str) -> bool:
        return f"{role}.weight" in self._tensors

    def table(self, name: str) -> Matrix:
        return self.loaders.matrix(self._tensors[name], False)

    def linear(self, role: str, transposed: bool) -> Linear:
        name, bias = f"{role}.weight", self._tensors.get(f"{role}.bias")
        return Linear(
            self.loaders.weight(name, self._tensors[name], transposed),
            None if bias is None else self.loaders.vector(bias, 0.0),
        )

    def norm(self, role: str, spec: NormSpec, width: int = 0) -> Norm:
        """A norm; where `width` is given it may lack weights, and then they are ones."""
        weight = self._tensors.get(f"{role}.weight")
        bias = self._tensors.get(f"{role}.bias")
        if weight is None and width:
            return Norm(spec.kind, spec.eps, self.loaders.ops.vector(torch.ones(width)))
        return Norm(
            spec.kind,
            spec.eps,
            self.loaders.vector(self._tensors[f"{role}.weight"], spec.offset),
            None if bias is None else self.loaders.vector(bias, 0.0),
        )

    def post_norm(self, spec: NormSpec | None) -> Norm | None:
        return None if spec is None else self.norm("post_norm", spec)
