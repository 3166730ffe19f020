"""Attention by FlashInfer against plain torch: which pages it is told of, when it is planned anew,
and who attends where it cannot. On a device the library itself, elsewhere its wrappers in torch."""

import logging
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import Unavailable
from ext.ops import Attention, Cache, Geometry, Patch, Place
from ext.reference import TorchOps
from ext.select import require_flashinfer
from tests.ext import torch_flash

pytest.importorskip("triton", reason="needs triton")

from ext.cuda import pagelists
from ext.cuda.flash import FlashAttention, Shape, workspace_bytes
from ext.cuda.graphs import Graphs
from ext.cuda.ops import CudaOps
from ext.cuda.plan import CudaPlan

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
BOUND = 2e-2 if torch.cuda.is_available() else 3e-3
LAYERS, PAGE = 2, 16
REFERENCE = TorchOps(str(DEVICE))


def library() -> ModuleType:
    return pytest.importorskip("flashinfer") if DEVICE.type == "cuda" else torch_flash


def geometry(new: list[int], contexts: list[int], spare: int = 1) -> Geometry:
    pages = -(-max(contexts) // PAGE) + spare
    shuffled = np.random.default_rng(0).permutation(len(contexts) * LAYERS * pages)
    tables = shuffled.reshape(len(contexts), LAYERS, pages).astype("i4")
    starts = np.concatenate([[0], np.cumsum(new)]).astype("i4")
    return Geometry(starts, np.array(contexts, "i4"), tables)


class Layers:
    """Attention of a few layers over pages of their own; rows are q, k and v side by side."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 64, window: int | None = None):
        torch.manual_seed(0)
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        size = (400, 2, PAGE, kv_heads, dim)
        self.pages = torch.randn(size, device=DEVICE).to(DTYPE)
        self.how = Attention(dim**-0.5, window=window)

    def run(self, ops: Any, rows: Tensor, plan: Any, pages: Tensor) -> Tensor:
        q, k, v = rows.split(self.sizes, 1)
        cache = Cache(pages, PAGE)
        made = [ops.attend(q, k, v, self.how, Place(cache, i, plan)) for i in range(LAYERS)]
        return torch.cat(made, 1).float()

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, sum(self.sizes), device=DEVICE)

    def expected(self, rows: Tensor, place: Geometry) -> Tensor:
        return self.run(REFERENCE, rows, REFERENCE.plan(place), self.pages.float())


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= BOUND * expected.norm()


def kernels() -> tuple[CudaOps, FlashAttention]:
    flash = FlashAttention(library(), DEVICE)
    return CudaOps(str(DEVICE), flash=flash), flash


@pytest.mark.parametrize("contexts", [[1], [16], [17, 1, 32], [5, 100, 16, 31]])
def test_lists_every_page_of_every_layer_once_and_in_order(contexts: list[int]) -> None:
    place = geometry([1] * len(contexts), contexts, spare=3)
    bound = pagelists.bounds(place.contexts, PAGE)
    used = [-(-context // PAGE) for context in contexts]
    lengths = [(n - 1) * PAGE + int(last) for n, last in zip(used, bound.last, strict=True)]
    assert lengths == contexts
    room = pagelists.room(LAYERS, bound.total + 5, DEVICE)
    tables = torch.from_numpy(place.tables).to(DEVICE)
    pages = pagelists.listed(tables, bound, room).cpu().numpy()
    for layer in range(LAYERS):
        wanted = np.concatenate([place.tables[i, layer, :n] for i, n in enumerate(used)])
        assert pages[layer, : bound.total].tolist() == wanted.tolist()
        assert not pages[layer, bound.total :].any()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("new", "contexts"),
    [([1, 1, 1], [1, 40, 300]), ([3, 5], [3, 90]), ([1, 6, 1, 2], [33, 6, 16, 200])],
)
def test_attends_in_decode_and_prefill(
    new: list[int], contexts: list[int], window: int | None
) -> None:
    layers, place = Layers(window=window), geometry(new, contexts)
    ops, flash = kernels()
    rows = layers.rows(sum(new))
    expected = layers.expected(rows, place)
    assert_near(layers.run(ops, rows, ops.plan(place), layers.pages), expected)
    assert len(flash._seats) > 0


def test_batches_and_shapes_that_take_turns_do_not_meet() -> None:
    ops, _ = kernels()
    near, far = Layers(heads=6, kv_heads=1, window=18), Layers(heads=8, kv_heads=8)
    places = [geometry([1, 1], [200, 9]), geometry([1, 1], [30, 64])]
    plans = [ops.plan(place) for place in places]
    for layers in (near, far):
        for place, plan in zip(places * 2, plans * 2, strict=True):
            rows = layers.rows(2)
            expected = layers.expected(rows, place)
            assert_near(layers.run(ops, rows, plan, layers.pages), expected)


@pytest.mark.parametrize("window", [None, 20])
def test_a_captured_step_attends_to_whatever_batch_is_loaded(window: int | None) -> None:
    layers, (ops, flash) = Layers(window=window), kernels()
    graphs = Graphs(DEVICE)

    def step(x: Tensor, plan: CudaPlan, _: object) -> Tensor:
        made = layers.run(ops, x, plan, layers.pages)
        x[:, : made.shape[1]].copy_(made[:, : x.shape[1]])
        return x

    none: list[Patch | None] = []
    for contexts in ([3, 40, 100], [7, 8, 9, 10], [200, 1, 16], [201, 2, 17]):
        place = geometry([1] * len(contexts), contexts)
        x = layers.rows(len(contexts))
        expected = layers.expected(x, place)[:, : x.shape[1]]
        assert graphs.run((1,), x, (ops.plan(place), 399), none, step) is x
        assert_near(x, expected)
    assert graphs.counts.captured == 1
    assert graphs.counts.replayed == 3
    assert {key[0].window for key in flash._seats} == {window or 0}, "only what was tried is eager"


@pytest.mark.parametrize(
    ("dim", "dtype"), [(20, DTYPE), (96, DTYPE), (64, torch.float32)], ids=["20", "96", "float32"]
)
def test_other_shapes_are_left_to_our_own_kernels(dim: int, dtype: torch.dtype) -> None:
    layers, (ops, flash) = Layers(dim=dim), kernels()
    layers.pages = layers.pages.to(dtype)
    place, rows = geometry([1, 4], [30, 20]), layers.rows(5)
    expected = layers.expected(rows, place)
    assert_near(layers.run(ops, rows, ops.plan(place), layers.pages), expected)
    assert not flash._seats


class Broken:
    """A library whose kernels cannot be compiled."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("ninja: build stopped\nand 400 lines more")


def test_a_library_that_cannot_run_is_named_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    ops = CudaOps(str(DEVICE), flash=FlashAttention(Broken(), DEVICE))
    layers, place = Layers(), geometry([1, 4], [30, 20])
    rows = layers.rows(5)
    expected = layers.expected(rows, place)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert_near(layers.run(ops, rows, ops.plan(place), layers.pages), expected)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "(ninja: build stopped)" in warned[0]
    assert "--attention-backend triton" in warned[0]
    assert "64 wide" in caplog.text
    assert caplog.text.rstrip().endswith("Triton")


def test_the_workspace_is_what_the_librarys_own_plan_takes() -> None:
    llama = Shape(32, 8, 128, PAGE, torch.bfloat16, 0.1, 0)
    # 264 blocks fit 132 multiprocessors, 33 tiles of 128 rows for each KV head.
    assert workspace_bytes(llama, 0, 132) == 32 * 33 * 128 * 129 * 4 + 4096
    # 256 captured rows: 64 tiles of 16, and 255 that are not full.
    assert workspace_bytes(llama, 256, 132) == 32 * (64 + 255) * 16 * 129 * 4 + 4096
    wide = Shape(64, 2, 128, PAGE, torch.bfloat16, 0.1, 0)
    assert workspace_bytes(wide, 8, 132) == 64 * 132 * 128 * 129 * 4 + 4096


@pytest.mark.parametrize("version", ["0.6.13", "0.5.9", "0.7.0", "1.0"])
def test_a_library_of_another_interface_is_refused(version: str) -> None:
    with pytest.raises(Unavailable, match=rf"version {version} is not 0\.6\.14 or a later"):
        require_flashinfer(version)


@pytest.mark.parametrize("version", ["0.6.14", "0.6.15.dev1", "0.6.20+cu130"])
def test_a_library_of_the_known_interface_is_taken(version: str) -> None:
    require_flashinfer(version)
