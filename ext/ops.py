"""The kernel interface: what a device must be able to do for the workers.

Three implementations: `ext.reference` (plain torch, the specification), `ext.cpu` (native CPU
kernels) and `ext.cuda`. Activations are float32 [rows, width] on CPU (the model's dtype on CUDA)
and lie on the implementation's device. A row is one position of one sequence; rows of a sequence
lie together and in order. `workers.runner` is the only caller of the step operations,
`workers.residency` of `matrix` and `vector`.

A step runs per layer as: project -> attend -> accumulate (attention unit), project -> activate ->
accumulate (MLP unit), so an implementation can fuse norms, biases, adapters, rope, cache writes and
residuals into few launches. Layers that norm what they add end in project -> add_norm.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ext.quantize import Quantized

# Made and read by one implementation alone.
Opaque: TypeAlias = Any

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
# What linear layers and attention multiply; "auto": what the weights are.
Dtype = Literal["auto", "float32", "bfloat16"]


class Matrix(Protocol):
    """A resident weight [out, in] in the implementation's own form."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class NormRows:
    """Rows [first, last) of the batch take these weights in place of the norm's own."""

    first: int
    last: int
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization over the last axis with its weights, float32 [width]: rms(x) * weight, or
    layer(x) * weight + bias. `rows` are sorted, disjoint and not empty."""

    kind: NormKind
    eps: float
    weight: Tensor
    bias: Tensor | None = None
    rows: tuple[NormRows, ...] = ()


@dataclass(eq=False, slots=True)
class Prepared:
    """What the kernels made of something at its first use; theirs alone."""

    value: Opaque = None


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows [first, last) of the batch get y += scale * (x A^T) B^T. A [rank, in], B [out, rank], as
    `Ops.factor` made them. Segments are not empty; several of a patch may cover the same rows.
    Segments of the same factors upon the same linear may share what is `prepared` of these."""

    first: int
    last: int
    a: Tensor
    b: Tensor
    scale: float
    prepared: Prepared | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Rows [first, last) of the batch end in y = gain * y + bias, float32 [out], once the low-rank
    pieces are added. gain None: 1; bias None: the linear's own."""

    first: int
    last: int
    gain: Tensor | None = None
    bias: Tensor | None = None


@dataclass(eq=False, slots=True)
class Patch:
    """The attachments of one linear layer for one arrangement of rows; kept by the caller while
    that arrangement lasts, so an implementation may leave its prepared form in `prepared`.
    `finishes` are sorted, disjoint and not empty."""

    segments: tuple[LoraSegment, ...]
    finishes: tuple[Finish, ...] = ()
    prepared: Opaque = None


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + bias."""

    weight: Matrix
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowGain:
    """Rows [first, last) of the batch are multiplied by `vector`, float32 [width]."""

    first: int
    last: int
    vector: Tensor


@dataclass(frozen=True, slots=True)
class Detour:
    """Rows [first, last) of the batch get x += scale * up(act(down(z))): a bottleneck adapter."""

    first: int
    last: int
    down: Linear
    up: Linear
    activation: Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "none"]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the rows of a batch stand: numpy, made once per wave.

    Sequence i owns rows [starts[i], starts[i+1]) at positions contexts[i] - n_i .. contexts[i] - 1,
    where n_i is its number of rows; contexts[i] counts its tokens after this step. `tables[i, l,
    p]` is the page of attention layer l (counted within the batch's chains) that holds positions
    [16 p, 16 p + 16). Shapes: starts int32 [S + 1], contexts int32 [S], tables int32 [S, layers,
    P]."""

    starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.contexts)


@dataclass(eq=False, slots=True)
class Cache:
    """KV pages of one shape: data [pages, 2, page, kv_heads, head_dim] (K is 0, V is 1), float32 or
    bfloat16 (on CUDA float16, too). What attention reads is what the pages hold: those of 16 bits
    round keys and values."""

    data: Tensor
    page: int = field(default=16)


class Plan(Protocol):
    """An implementation's prepared form of a Geometry: positions, write slots, page lists per
    layer."""

    @property
    def geometry(self) -> Geometry: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """How a layer attends: norms of q and k per head, rotary, the scale of the scores, and how many
    positions back a row sees (None: all)."""

    scale: float
    rotary: Opaque = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer attends: the pages, which attention layer of the chains it is, and the plan."""

    cache: Cache
    layer: int
    plan: Opaque


class Ops(Protocol):
    """See the module's text. All tensors returned are fresh; only `accumulate`, `add_norm`, `scale`
    and `detour` write in place. Matrices, factors, rotaries and plans are passed only to the
    implementation that made them."""

    name: str
    device: torch.device
    dtype: Dtype

    def loading(self) -> AbstractContextManager[None]:
        """What a thread makes resident within this is ready for every other when it ends. Nobody
        else waits for that; one thread at a time."""
        ...

    def synchronize(self) -> None:
        """Wait until all work that was queued so far is done."""
        ...

    def matrix(self, weight: Tensor, *, transposed: bool = False) -> Matrix:
        """Resident form of a stored matrix [out, in] ([in, out] if transposed); f32, f16 or bf16,
        without loss. It must not keep `weight` (a mapped file) alive unless it uses that memory."""
        ...

    def coded(self, weight: Quantized) -> Matrix:
        """Resident form of a linear layer's weight that was rounded to a few bits. Products over it
        take float32 rows and are those of `weight.dense()`."""
        ...

    def vector(self, weight: Tensor) -> Tensor:
        """Resident form of a norm weight, a bias or a gain: float32, contiguous."""
        ...

    def factor(self, weight: Tensor) -> Tensor:
        """Resident form of a low-rank matrix, [rank, in] or [out, rank], in its stored precision
        (f32, f16 or bf16); sums over it are float32. It goes into LoraSegments and nowhere else:
        an implementation may lay it out anew."""
        ...

    def rotary(
        self, inverse_frequencies: Sequence[float], factor: float, interleaved: bool, positions: int
    ) -> Opaque:
        """Prepared rotary embedding for positions below `positions`: the first
        2 * len(inverse_frequencies) elements of a head turn (halves, or neighbours if interleaved),
        cos and sin are multiplied by `factor`, the rest passes."""
        ...

    def memory(self, nbytes: int) -> Tensor:
        """Bytes for KV pages, uint8 [nbytes], at least 64-byte aligned; host memory is committed as
        it is written, or by `ext.memory.commit`."""
        ...

    def indices(self, rows: np.ndarray) -> Tensor:
        """Numbers on the device, int64; the host does not wait for it."""
        ...

    def plan(self, geometry: Geometry, last: Opaque = None) -> Plan:
        """Prepare a batch's geometry once; it serves every layer of every block the batch runs.
        `last` is that of the batch before, and may be used no more: what has not changed since is
        taken over."""
        ...

    def embed(
        self,
        tokens: np.ndarray,
        table: Opaque,
        scale: float,
        positions: Opaque,
        plan: Opaque,
        offset: int,
    ) -> Tensor:
        """x[r] = scale * table[tokens[r]] (+ positions[position r + offset]); tokens int64 [rows],
        all of them in the table."""
        ...

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        """y_i = linear_i(norm(x)) with patch_i (see LoraSegment and Finish); norm None: x as it is.
        float32 [rows, out_i]."""
        ...

    def project_gated(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        kind: Activation,
    ) -> Tensor:
        """act(gate) * up for linears (gate, up), as project and activate would give it. In a step
        that is replayed the next operation alone may read it: it may never be written."""
        ...

    def append(self, k: Tensor, v: Tensor, how: Attention, at: Place) -> None:
        """Norm k per head where asked, rotate it, write k and v [rows, kv_heads * head_dim] into
        the pages."""
        ...

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, how: Attention, at: Place
    ) -> Tensor:
        """`append` k and v, unless they are None: then it was done before. Norm q per head where
        asked, rotate it, then causal attention of each row over its sequence's positions (the last
        `how.window`, if set).

        q [rows, heads * head_dim] -> [rows, heads * head_dim].
        """
        ...

    def split(self, y: Tensor, groups: int, widths: Sequence[int]) -> list[Tensor]:
        """Parts [rows, groups * width] of y, whose every group has one of each width."""
        ...

    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor:
        """act(gate) * up, or act(up) where gate is None."""
        ...

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        """x += linear(y) + patch(y), in place; x [rows, out]."""
        ...

    def best(self, x: Tensor, norm: Norm | None, linear: Linear, patch: Patch | None) -> Tensor:
        """argmax of what `project` would give of one linear: int64 [rows]."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """The best of each row of logits [rows, vocabulary], the first of equals: int64 [rows]."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        """x += norm(y), in place; both [rows, width]."""
        ...

    def scale(self, x: Tensor, gains: Sequence[RowGain]) -> None:
        """Multiply rows of x [rows, width] in place; the gains' rows are disjoint."""
        ...

    def detour(self, x: Tensor, z: Tensor, detours: Sequence[Detour]) -> None:
        """Add what bottleneck adapters make of z to rows of x, in place; x and z, [rows, hidden],
        may be one tensor; the detours' rows are disjoint."""
        ...


class PackedMatrix(Matrix, Protocol):
    """A matrix whose bytes, uint8, can be kept and put back."""

    @property
    def memory(self) -> np.ndarray: ...


class Packs(Protocol):
    """Makes resident matrices in two steps, the second in whatever thread: one is reserved, then
    filled by packing, which says how much memory it takes. Or they are laid over bytes that were
    kept, which fit wherever `layout` is the same, and move into better memory later."""

    layout: str

    def reserve(self, out: int, width: int, dtype: torch.dtype) -> PackedMatrix:
        """A matrix [out, width] that is to be filled, without memory."""
        ...

    def fill(self, matrix: Opaque, weight: Tensor) -> None:
        """Pack a weight [out, width] into the matrix that was reserved for it."""
        ...

    def over(self, memory: np.ndarray, out: int, width: int, dtype: torch.dtype) -> PackedMatrix:
        """A matrix whose packed bytes are `memory`."""
        ...

    def copy(self, matrix: Opaque) -> np.ndarray:
        """A matrix's bytes in memory that operations read fastest; any thread may ask."""
        ...

    def move(self, matrix: Opaque, memory: np.ndarray) -> None:
        """Let a matrix lie in its copy from now on; no operation may be under way."""
        ...


@runtime_checkable
class PackingOps(Protocol):
    """Operations whose `matrix` repacks weights, and can do so in two steps."""

    @property
    def packing(self) -> Packs: ...
