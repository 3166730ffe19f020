"""A chain as plain differentiable torch: what surrogates and stitches are trained with.

The same units as a worker runs, over whole sequences instead of pages, so that gradients flow; the
workers' kernels stay the ones that count. Every native family, by its specs alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UnsupportedFamily
from zoo.manifest import (
    AttentionSpec,
    EmbedSpec,
    HeadSpec,
    MlpSpec,
    Norm,
    ObjectDigest,
    ParallelSpec,
    Rope,
    Spec,
    StitchSpec,
    Unit,
)
from zoo.store import Store

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CURVES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A unit with its tensors in memory, by role."""

    spec: Spec
    weights: Mapping[str, Tensor]


class Network:
    """Parts in order, bottom first. Sequences are whole: ids int64 [batch, length], activations
    [batch, length, hidden]; position 0 is the first column."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return len(self.parts)

    def logits(self, ids: Tensor) -> Tensor:
        """float32 [batch, length, vocabulary]."""
        return self.head(self.hidden(ids, len(self.parts) - 1))

    def hidden(self, ids: Tensor, depth: int) -> Tensor:
        """Activations after the parts [0, depth), depth >= 1."""
        return self.advance(self.embed(ids), 1, depth)

    def embed(self, ids: Tensor) -> Tensor:
        """What the embedding makes of token ids, float32."""
        part = self.parts[0]
        assert isinstance(part.spec, EmbedSpec)
        x = F.embedding(ids, part.weights["tokens.weight"]).float() * part.spec.scale
        table = part.weights.get("positions.weight")
        if table is None:
            return x
        offset = part.spec.position_offset
        return x + table[offset : offset + ids.shape[1]]

    def advance(self, x: Tensor, first: int, last: int) -> Tensor:
        """Run the parts [first, last), layers and stitches."""
        for part in self.parts[first:last]:
            x = stitched(part, x) if isinstance(part.spec, StitchSpec) else x + increment(part, x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits of activations that went through all layers, float32."""
        part = self.parts[-1]
        assert isinstance(part.spec, HeadSpec)
        normed = _norm(part.spec.norm, part.weights, "norm", x)
        return _linear(part.weights, "head", normed, transposed=False).float() * part.spec.scale

    def trained(self) -> dict[str, Tensor]:
        """The tensors that take gradients, each once, by "part role"."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for index, part in enumerate(self.parts):
            for role, tensor in part.weights.items():
                if tensor.requires_grad and id(tensor) not in seen:
                    found[f"{index} {role}"] = tensor
                    seen.add(id(tensor))
        return found


def read_network(store: Store, units: Iterable[Unit], dtype: torch.dtype) -> Network:
    """A chain of the store in memory; units that share a tensor share it here too."""
    known: dict[ObjectDigest, Tensor] = {}
    for unit in units:
        for digest in unit.tensors.values():
            if digest not in known:
                known[digest] = read_tensor(store, digest).to(dtype)
    return Network(
        [Part(u.spec, {role: known[digest] for role, digest in u.tensors.items()}) for u in units]
    )


def read_tensor(store: Store, digest: ObjectDigest) -> Tensor:
    """A stored tensor, copied into memory."""
    stored = store.tensor(digest)
    data = torch.frombuffer(bytearray(stored.data), dtype=_DTYPES[stored.dtype])
    return data.view(stored.shape)


def increment(part: Part, x: Tensor) -> Tensor:
    """What the unit of a layer adds to the activations x."""
    match part.spec:
        case AttentionSpec() as spec:
            return _finish(spec, part.weights, "o", attended(spec, part.weights, x))
        case MlpSpec() as spec:
            return _finish(spec, part.weights, "down", activated(spec, part.weights, x, "norm"))
        case ParallelSpec() as spec:
            inner = activated(spec.mlp, part.weights, x, "mlp_norm")
            y = _finish(
                spec.attention, part.weights, "o", attended(spec.attention, part.weights, x)
            )
            return y + _finish(spec.mlp, part.weights, "down", inner)
        case _:
            raise UnsupportedFamily(
                f"a unit of the kind {type(part.spec).__name__} cannot be trained: choose a chain "
                "whose layers are attention and MLP units"
            )


def stitched(part: Part, x: Tensor) -> Tensor:
    """The stream on the other side of a stitch, float32."""
    assert isinstance(part.spec, StitchSpec)
    table = part.weights["positions.weight"]
    added = table[buckets(x.shape[1], part.spec.buckets).to(table.device)]
    return _linear(part.weights, "map", x, transposed=False).float() + added.float()


def buckets(length: int, count: int) -> Tensor:
    """The bucket of each of the first positions: see `zoo.manifest.StitchSpec`."""
    positions = torch.arange(length, dtype=torch.float64)
    powers = torch.where(positions > 0, 1 + positions.clamp(min=1).log2().floor(), 0)
    return powers.long().clamp(max=count - 1)


def attended(spec: AttentionSpec, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What an attention unit has inside, before its output matrix: [.., heads * head_dim]."""
    normed = _norm(spec.norm, weights, "norm", x)
    q, k, v = _queries(spec, weights, normed)
    if spec.qk_norm is not None:
        q = _norm(spec.qk_norm, weights, "q_norm", q)
        k = _norm(spec.qk_norm, weights, "k_norm", k)
    if spec.rope is not None:
        cos, sin = _angles(spec.rope, x.shape[1], x.device)
        q, k = _turn(spec.rope, q, cos, sin), _turn(spec.rope, k, cos, sin)
    q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_window(spec.window, x.shape[1], x.device),
        is_causal=spec.window is None or spec.window >= x.shape[1],
        scale=spec.scale,
        enable_gqa=spec.heads != spec.kv_heads,
    )
    return y.transpose(1, 2).flatten(2)


def activated(spec: MlpSpec, weights: Mapping[str, Tensor], x: Tensor, norm: str) -> Tensor:
    """What an MLP has inside, before its output matrix: [.., intermediate]."""
    normed = _norm(spec.norm, weights, norm, x)
    curve = _CURVES[spec.activation]
    if spec.fused:
        gate, up = _linear(weights, "gate_up", normed, spec.transposed).chunk(2, dim=-1)
        return curve(gate) * up
    up = _linear(weights, "up", normed, spec.transposed)
    if not spec.gated:
        return curve(up)
    return curve(_linear(weights, "gate", normed, spec.transposed)) * up


def _finish(
    spec: AttentionSpec | MlpSpec, weights: Mapping[str, Tensor], role: str, inner: Tensor
) -> Tensor:
    y = _linear(weights, role, inner, spec.transposed)
    return y if spec.post_norm is None else _norm(spec.post_norm, weights, "post_norm", y)


def _queries(
    spec: AttentionSpec, weights: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v per head: [batch, length, heads, head_dim]."""
    if not spec.fused:
        q, k, v = (_linear(weights, role, x, spec.transposed) for role in ("q", "k", "v"))
    else:
        groups = spec.kv_heads if spec.grouped else 1
        kv = spec.kv_heads * spec.head_dim // groups
        fused = _linear(weights, "qkv", x, spec.transposed).unflatten(-1, (groups, -1))
        q, k, v = fused.split((spec.heads * spec.head_dim // groups, kv, kv), dim=-1)
        q, k, v = q.flatten(-2), k.flatten(-2), v.flatten(-2)
    return (
        q.unflatten(-1, (spec.heads, spec.head_dim)),
        k.unflatten(-1, (spec.kv_heads, spec.head_dim)),
        v.unflatten(-1, (spec.kv_heads, spec.head_dim)),
    )


def _linear(weights: Mapping[str, Tensor], role: str, x: Tensor, transposed: bool) -> Tensor:
    weight = weights[f"{role}.weight"]
    bias = weights.get(f"{role}.bias")
    return F.linear(x.to(weight.dtype), weight.T if transposed else weight, bias)


def _norm(norm: Norm, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
    """In float32, whatever the weights are."""
    stored, bias = weights.get(f"{role}.weight"), weights.get(f"{role}.bias")
    weight = None if stored is None else stored.float() + norm.offset
    width = (x.shape[-1],)
    if norm.kind == "rms":
        return F.rms_norm(x.float(), width, weight, norm.eps)
    return F.layer_norm(x.float(), width, weight, None if bias is None else bias.float(), norm.eps)


def _angles(rope: Rope, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def _turn(rope: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first pairs of each head; x [batch, length, heads, head_dim]."""
    width = 2 * cos.shape[1]
    turned, rest = x[..., :width].float(), x[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    if rope.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((y, rest.float()), dim=-1)


def _window(window: int | None, length: int, device: torch.device) -> Tensor | None:
    """What a row may see where not everything before it; None where plain causality says it."""
    if window is None or window >= length:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)
