"""Layers of random weights upon the native kernels, one upon the other, for steps to be made of."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ext.cpu import CpuOps
from ext.ops import Attention, Cache, Finish, Geometry, Linear, LoraSegment, Norm, Patch, Place
from ext.plan import CpuPlan

HIDDEN, HEADS, KV_HEADS, DIM, INNER = 48, 4, 2, 12, 80
WIDTH, KV_WIDTH = HEADS * DIM, KV_HEADS * DIM
LAYERS, PAGES, POSITIONS = 2, 61, 600


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


class Layer:
    """A whole layer of random weights: q, k, v apart and a gated MLP; or (`fused`) together, by
    heads, with norms behind both halves."""

    def __init__(self, ops: CpuOps, *, fused: bool) -> None:
        torch.manual_seed(0)
        self.ops, self.fused = ops, fused
        self.norms = [Norm("rms", 1e-6, random(HIDDEN)) for _ in range(4)]
        sizes = [WIDTH + 2 * KV_WIDTH] if fused else [WIDTH, KV_WIDTH, KV_WIDTH]
        self.inputs = [self.linear(size, HIDDEN) for size in sizes]
        self.output = self.linear(HIDDEN, WIDTH)
        self.inner = [self.linear(size, HIDDEN) for size in ([2 * INNER] if fused else [INNER] * 2)]
        self.down = self.linear(HIDDEN, INNER)
        rotary = ops.rotary([0.1] * (DIM // 2), 1.0, False, POSITIONS)
        self.how = Attention(DIM**-0.5, rotary, q_norm=Norm("rms", 1e-6, random(DIM)), window=200)
        self.cache = Cache(random(PAGES, 2, 16, KV_HEADS, DIM))

    def linear(self, out: int, width: int) -> Linear:
        return Linear(self.ops.matrix((random(out, width) / 7).bfloat16()), random(out))

    @property
    def linears(self) -> list[Linear]:
        return [*self.inputs, self.output, *self.inner, self.down]

    def step(self, x: Tensor, plan: CpuPlan, patches: Sequence[Patch | None]) -> Tensor:
        ops, given, n = self.ops, list(patches), len(self.inputs)
        parts = ops.project(x, self.norms[0], self.inputs, given[:n])
        if self.fused:
            widths = (WIDTH // KV_HEADS, DIM, DIM)
            parts = ops.split(parts[0], KV_HEADS, widths)
        q, k, v = parts
        y = ops.attend(q, k, v, self.how, Place(self.cache, 1, plan))
        self.add(x, y, self.output, given[n], self.norms[1])
        if self.fused:
            (both,) = ops.project(x, self.norms[2], self.inner, given[n + 1 : -1])
            gate, up = ops.split(both, 1, (INNER, INNER))
            y = ops.activate(gate, up, "gelu")
        else:
            y = ops.project_gated(x, self.norms[2], self.inner, given[n + 1 : -1], "silu")
        self.add(x, y, self.down, given[-1], self.norms[3])
        return x

    def add(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None, norm: Norm) -> None:
        if not self.fused:
            self.ops.accumulate(x, y, linear, patch)
            return
        (added,) = self.ops.project(y, None, [linear], [patch])
        self.ops.add_norm(x, added, norm)


class Plain(Layer):
    """Q, k and v together, and an MLP without a gate: nothing is normed behind the halves."""

    def __init__(self, ops: CpuOps) -> None:
        super().__init__(ops, fused=True)
        self.inner = [self.linear(4 * HIDDEN, HIDDEN)]
        self.down = self.linear(HIDDEN, 4 * HIDDEN)

    def step(self, x: Tensor, plan: CpuPlan, patches: Sequence[Patch | None]) -> Tensor:
        ops, (on_inputs, on_output, on_inner, on_down) = self.ops, patches
        (both,) = ops.project(x, self.norms[0], self.inputs, [on_inputs])
        q, k, v = ops.split(both, KV_HEADS, (WIDTH // KV_HEADS, DIM, DIM))
        y = ops.attend(q, k, v, self.how, Place(self.cache, 1, plan))
        ops.accumulate(x, y, self.output, on_output)
        (up,) = ops.project(x, self.norms[2], self.inner, [on_inner])
        ops.accumulate(x, ops.activate(None, up, "gelu"), self.down, on_down)
        return x


class Stack(Layer):
    """Layers on top of each other, with pages of the first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.ops, self.layers, self.cache = layers[0].ops, layers, layers[0].cache
        for layer in layers:
            layer.cache = self.cache

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears]

    def step(self, x: Tensor, plan: CpuPlan, patches: Sequence[Patch | None]) -> Tensor:
        at = 0
        for layer in self.layers:
            end = at + len(layer.linears)
            layer.step(x, plan, patches[at:end])
            at = end
        return x


class Headed(Stack):
    """The same with a head behind it, of which the best of each row is wanted."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.head = self.layers[0].linear(300, HIDDEN)

    @property
    def linears(self) -> list[Linear]:
        return [*super().linears, self.head]

    def step(self, x: Tensor, plan: CpuPlan, patches: Sequence[Patch | None]) -> Tensor:
        super().step(x, plan, patches[:-1])
        return self.ops.best(x, self.layers[0].norms[0], self.head, patches[-1])


def stack(ops: CpuOps, kind: str) -> Stack:
    made = Headed if kind == "headed" else Stack
    return made([Plain(ops) if kind == "plain" else Layer(ops, fused=False) for _ in range(3)])


class Worded(Headed):
    """The same, and it begins with tokens, at learned positions or none."""

    def __init__(self, layers: Sequence[Layer], *, positions: bool) -> None:
        super().__init__(layers)
        self.table = self.ops.matrix(random(100, HIDDEN))
        self.positions = self.ops.matrix(random(POSITIONS + 1, HIDDEN)) if positions else None

    def read(
        self, tokens: np.ndarray | Tensor, plan: CpuPlan, patches: Sequence[Patch | None]
    ) -> Tensor:
        assert isinstance(tokens, np.ndarray)
        x = self.ops.embed(tokens, self.table, 0.5, self.positions, plan, 2)
        return self.step(x, plan, patches)


def worded(ops: CpuOps, *, positions: bool) -> Worded:
    return Worded([Layer(ops, fused=False) for _ in range(2)], positions=positions)


def geometry(contexts: list[int], new: list[int] | None = None) -> Geometry:
    """Sequences with so many positions, of which so many are rows (one each)."""
    pages = max(contexts) // 16 + 1
    taken = np.arange(len(contexts) * LAYERS * pages, dtype=np.int32)
    tables = taken.reshape(len(contexts), LAYERS, pages) % PAGES
    starts = np.cumsum([0, *(new or [1] * len(contexts))]).astype("i4")
    return Geometry(starts, np.array(contexts, "i4"), tables)


def nothing(layer: Layer) -> list[Patch | None]:
    return [None] * len(layer.linears)


def adapters(layer: Layer, runs: list[tuple[int, int, int]]) -> list[Patch | None]:
    """On every other linear: low-rank pieces for rows [first, last), of a rank each, and gains."""
    patches, factor = nothing(layer), layer.ops.factor
    for i in range(0, len(patches), 2):
        matrix = layer.linears[i].weight
        out, width = matrix.out_features, matrix.in_features
        segments = tuple(
            LoraSegment(
                first, last, factor(random(rank, width)), factor(random(out, rank) / 9), 0.5
            )
            for first, last, rank in runs
        )
        patches[i] = Patch(segments, tuple(Finish(a, b, random(out)) for a, b, _ in runs))
    return patches
