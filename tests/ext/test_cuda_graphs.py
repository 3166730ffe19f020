"""Decode steps at fixed addresses: what is captured with one batch serves all others of its bucket.

Without a device a captured step is run again instead of replayed, over the same fixed memory."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.ops import Attention, Cache, Finish, Geometry, Linear, LoraSegment, Norm, Patch, Place

pytest.importorskip("triton", reason="needs triton")

from ext.cuda.graphs import Graphs
from ext.cuda.ops import CudaOps
from ext.cuda.plan import CudaPlan

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = CudaOps(DEVICE)
HIDDEN, HEADS, KV_HEADS, DIM = 48, 4, 2, 12
LAYERS, SCRATCH = 2, 60


class Layer:
    """An attention half-layer of random weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
        self.norm = Norm("rms", 1e-6, random(HIDDEN))
        self.inputs = [Linear(OPS.matrix(random(size, HIDDEN) / 7)) for size in sizes]
        self.output = Linear(OPS.matrix(random(HIDDEN, HEADS * DIM) / 7), random(HIDDEN))
        self.how = Attention(DIM**-0.5, OPS.rotary([0.1] * 6, 1.0, False, 600), window=200)
        self.cache = Cache(random(SCRATCH + 1, 2, 16, KV_HEADS, DIM))

    def step(self, x: Tensor, plan: CudaPlan, patches: list[Patch | None]) -> Tensor:
        q, k, v = OPS.project(x, self.norm, self.inputs, patches[:3])
        y = OPS.attend(q, k, v, self.how, Place(self.cache, 1, plan))
        OPS.accumulate(x, y, self.output, patches[3])
        return x


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def geometry(contexts: list[int]) -> Geometry:
    pages = max(contexts) // 16 + 1
    taken = np.arange(len(contexts) * LAYERS * pages, dtype=np.int32)
    tables = taken.reshape(len(contexts), LAYERS, pages) % SCRATCH
    return Geometry(np.arange(len(contexts) + 1, dtype="i4"), np.array(contexts, "i4"), tables)


def adapters(runs: list[tuple[int, int, int]]) -> list[Patch | None]:
    """On q and o: low-rank pieces for rows [first, last), of a rank each, and a gain on o."""

    def patch(out: int, width: int) -> Patch:
        segments = tuple(
            LoraSegment(first, last, random(rank, width), random(out, rank) / 9, 0.5)
            for first, last, rank in runs
        )
        finishes = tuple(Finish(first, last, random(out)) for first, last, _ in runs)
        return Patch(segments, finishes if width == HEADS * DIM else ())

    return [patch(HEADS * DIM, HIDDEN), None, None, patch(HIDDEN, HEADS * DIM)]


def assert_replays(
    graphs: Graphs, layer: Layer, contexts: list[int], patches: list[Patch | None]
) -> None:
    place = geometry(contexts)
    x = random(len(contexts), HIDDEN)
    before = layer.cache.data.clone()
    expected = x.clone()
    layer.step(expected, OPS.plan(place), patches)
    pages = layer.cache.data.clone()
    layer.cache.data.copy_(before)
    assert graphs.run((1,), x, (OPS.plan(place), SCRATCH), patches, layer.step) is x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.cache.data[:SCRATCH], pages[:SCRATCH])


def test_one_capture_serves_batches_of_its_bucket() -> None:
    graphs, layer = Graphs(OPS.device), Layer()
    plain: list[Patch | None] = [None] * 4
    for contexts in ([3, 40, 100], [7, 8, 9, 10], [200, 1, 16], [1, 2, 3]):
        assert_replays(graphs, layer, contexts, plain)
    assert len(graphs) == 1
    assert_replays(graphs, layer, [5], plain)
    assert len(graphs) == 2


def test_captured_with_one_attachment_replays_with_many() -> None:
    graphs, layer = Graphs(OPS.device), Layer()
    assert_replays(graphs, layer, [3, 40, 100], adapters([(1, 2, 4)]))
    assert_replays(graphs, layer, [3, 40, 100, 9], adapters([(0, 1, 1), (1, 3, 16), (3, 4, 9)]))
    assert_replays(graphs, layer, [30, 4, 10], adapters([(2, 3, 2)]))
    assert len(graphs) == 1
    kept = adapters([(0, 2, 3)])
    for contexts in ([5, 6, 7], [6, 7, 8]):
        assert_replays(graphs, layer, contexts, kept)
    assert_replays(graphs, layer, [3, 40, 100], adapters([(0, 3, 17)]))
    assert len(graphs) == 2


def test_an_adapter_that_goes_is_not_held_by_the_step_it_was_last_upon() -> None:
    graphs, layer = Graphs(OPS.device), Layer()
    worn = adapters([(0, 2, 4)])
    assert_replays(graphs, layer, [5, 6], worn)
    factor = weakref.ref(worn[0].segments[0].a)
    del worn
    assert factor() is not None
    graphs.retain(lambda units: True)
    gc.collect()
    assert factor() is None
    assert len(graphs) == 1
    assert_replays(graphs, layer, [5, 6], adapters([(0, 1, 3)]))
    assert len(graphs) == 1


def test_the_least_used_capture_leaves_and_too_large_a_batch_is_left_alone() -> None:
    graphs, layer = Graphs(OPS.device, capacity=2), Layer()
    plain: list[Patch | None] = [None] * 4
    for count in (1, 2, 3):
        assert_replays(graphs, layer, [4] * count, plain)
    assert len(graphs) == 2
    x = random(300, HIDDEN)
    untouched = x.clone()
    batch = (OPS.plan(geometry([2] * 300)), SCRATCH)
    assert graphs.run((1,), x, batch, plain, layer.step) is None
    assert torch.equal(x, untouched)
