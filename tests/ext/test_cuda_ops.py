"""The CUDA kernels against plain torch: on a device where there is one, else in Triton's
interpreter; float32 agrees to rounding, 16 bits to the precision of what is stored."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.ops import (
    Attention,
    Cache,
    Detour,
    Finish,
    Geometry,
    Linear,
    LoraSegment,
    Norm,
    NormRows,
    Patch,
    Place,
    RowGain,
)
from ext.reference import TorchOps

pytest.importorskip("triton", reason="needs triton")

from ext.cuda.ops import CudaOps

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = CudaOps(DEVICE)
REFERENCE = TorchOps(DEVICE)
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The interpreter has no products of bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def on(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    error = (got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
    assert error <= BOUNDS[dtype]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    page: int = 16
    layers: int = 2


def geometry(new: list[int], contexts: list[int], shape: Shape) -> Geometry:
    rng = np.random.default_rng(0)
    pages = max(-(-context // shape.page) for context in contexts) + 1
    shuffled = rng.permutation(len(contexts) * shape.layers * pages)
    tables = shuffled.reshape(len(contexts), shape.layers, pages).astype("i4")
    starts = np.concatenate([[0], np.cumsum(new)]).astype("i4")
    return Geometry(starts, np.array(contexts, "i4"), tables)


def filled_cache(place: Geometry, shape: Shape, dtype: torch.dtype) -> Cache:
    """Random pages, but NaN where nothing was written."""
    data = on(place.tables.size, 2, shape.page, shape.kv_heads, shape.dim).to(dtype)
    counts = np.diff(place.starts)
    for i, context in enumerate(place.contexts):
        for page, ids in enumerate(place.tables[i].T):
            written = int(context - counts[i]) - page * shape.page
            if written < shape.page:
                data[torch.from_numpy(ids.astype("i8")), :, max(written, 0) :] = torch.nan
    return Cache(data, shape.page)


def assert_attends(
    new: list[int],
    contexts: list[int],
    shape: Shape,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    norms: tuple[Norm | None, Norm | None] = (None, None),
    rotary: tuple[int, bool] | None = None,
    programs: int = 2,
) -> None:
    place = geometry(new, contexts, shape)
    rows = place.num_rows
    q = on(rows, shape.heads * shape.dim)
    k, v = on(rows, shape.kv_heads * shape.dim), on(rows, shape.kv_heads * shape.dim)
    cache = filled_cache(place, shape, dtype)
    ops = CudaOps(DEVICE)
    ops._programs = programs
    outs: list[Tensor] = []
    pages: list[Tensor] = []
    for which in (REFERENCE, ops):
        turn = None
        if rotary is not None:
            frequencies = [10000 ** (-i / rotary[0]) for i in range(rotary[0])]
            turn = which.rotary(frequencies, 1.1, rotary[1], 1100)
        data = cache.data.clone() if which is ops else cache.data.float()
        own = Cache(data, shape.page)
        how = Attention(shape.dim**-0.5, turn, norms[0], norms[1], window)
        outs.append(which.attend(q, k, v, how, Place(own, 1, which.plan(place))))
        pages.append(own.data.float())
    assert_near(outs[1], outs[0], dtype)
    assert torch.equal(pages[0].isnan(), pages[1].isnan())
    assert_near(pages[1].nan_to_num(), pages[0].nan_to_num(), dtype)


SHAPES = [
    Shape(9, 3, 64),
    Shape(4, 4, 8),
    Shape(8, 1, 80),
    Shape(6, 3, 96),
    Shape(14, 2, 20, page=8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attends_in_decode_and_prefill(shape: Shape, dtype: torch.dtype) -> None:
    assert_attends([1, 5, 40, 1], [33, 5, 40, 1], shape, dtype)


@pytest.mark.parametrize("own", [False, True])
def test_the_last_rows_attend_once_the_keys_of_all_are_written(*, own: bool) -> None:
    shape, norm = Shape(4, 2, 24), head_norm("rms", own=own)
    place = geometry([1, 5, 40], [33, 5, 60], shape)
    narrow = Geometry(np.array([0, 1, 2, 4], "i4"), place.contexts, place.tables)
    rows = [0, 5, 44, 45]
    q, k, v = (on(46, heads * 24) for heads in (4, 2, 2))
    ops = CudaOps(DEVICE)
    whole = filled_cache(place, shape, torch.float32)
    apart = Cache(whole.data.clone(), shape.page)
    turn = ops.rotary([0.1] * 12, 1.0, False, 60)
    how = Attention(0.2, turn, replace(norm, rows=()), norm)
    expected = ops.attend(q, k, v, how, Place(whole, 1, ops.plan(place)))
    ops.append(k, v, how, Place(apart, 1, ops.plan(place)))
    got = ops.attend(q[rows], None, None, how, Place(apart, 1, ops.plan(narrow)))
    assert torch.equal(apart.data.nan_to_num(), whole.data.nan_to_num())
    assert_near(got, expected[rows], torch.float32)


@pytest.mark.parametrize("programs", [1, 16, 200])
def test_splits_contexts_of_single_rows(programs: int) -> None:
    shape = Shape(4, 2, 16)
    contexts = [1, 63, 64, 65, 300]
    assert_attends([1] * 5, contexts, shape, torch.float32, programs=programs)
    assert_attends([1] * 5, contexts, shape, torch.float32, programs=programs, window=70)


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_sees_only_the_window(window: int) -> None:
    assert_attends([1, 70, 3], [300, 90, 130], Shape(6, 2, 16), torch.float32, window=window)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 10), (10, 5)])
def test_rotates_whole_and_partial_heads(dim: int, half: int, interleaved: bool) -> None:
    shape = Shape(4, 2, dim)
    assert_attends([1, 20], [1000, 21], shape, torch.float32, rotary=(half, interleaved))


def head_norm(kind: str, *, own: bool) -> Norm:
    bias = on(24) if kind == "layer" else None
    rows = (NormRows(1, 4, on(24), bias),) if own else ()
    return Norm(kind, 1e-6, on(24), bias, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_heads(kind: str, own: bool) -> None:
    shape = Shape(4, 2, 24)
    norms = (head_norm(kind, own=own), head_norm(kind, own=own))
    assert_attends([1, 9], [40, 30], shape, torch.float32, norms=norms, rotary=(12, False))
    assert_attends([1, 9], [40, 30], shape, torch.float32, norms=(None, norms[1]))


def lora(first: int, last: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> object:
    out, width = shape
    a, b = on(rank, width).to(dtype), on(out, rank).to(dtype)
    return LoraSegment(first, last, a, b, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer", None])
def test_projects_with_every_attachment(kind: str | None, dtype: torch.dtype) -> None:
    rows, width, outs = 45, 72, (130, 24)
    x = on(rows, width)
    norm = None
    if kind is not None:
        bias = on(width) if kind == "layer" else None
        own = (NormRows(2, 9, on(width), bias), NormRows(30, 31, on(width), None))
        norm = Norm(kind, 1e-5, on(width), bias, own)  # type: ignore[arg-type]
    weights = [(on(out, width) / 8).to(dtype) for out in outs]
    biases = [on(outs[0]), None]
    segments = [
        lora(0, 1, 3, (outs[0], width), dtype),
        lora(1, 20, 16, (outs[0], width), dtype),
        lora(5, 45, 33, (outs[0], width), torch.float32),
        lora(6, 8, 8, (outs[0], width), dtype),
        lora(8, 12, 150, (outs[0], width), dtype),
    ]
    finishes = (Finish(1, 3, on(outs[0]), on(outs[0])), Finish(9, 30, on(outs[0]), None))
    found: list[list[Tensor]] = []
    for which in (REFERENCE, OPS):
        patch = Patch(tuple(segments), finishes)  # type: ignore[arg-type]
        plain = Patch((), (Finish(0, 2, None, on(outs[1]).fill_(0.5)),))
        linears = [Linear(which.matrix(w), b) for w, b in zip(weights, biases, strict=True)]
        found.append(which.project(x, norm, linears, (patch, plain)))
    for expected, got in zip(*found, strict=True):
        assert got.dtype is torch.float32
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_accumulates(dtype: torch.dtype, biased: bool) -> None:
    y, weight, bias = on(7, 40), (on(96, 40) / 6).to(dtype), on(96) if biased else None
    start = on(7, 96)
    found: list[Tensor] = []
    for which in (REFERENCE, OPS):
        linear = Linear(which.matrix(weight.t().contiguous(), transposed=True), bias)
        patch = Patch((lora(2, 5, 4, (96, 40), dtype),), (Finish(4, 6, start[0], start[1]),))  # type: ignore[arg-type]
        torch.manual_seed(1)
        patch = Patch((lora(2, 5, 4, (96, 40), dtype),), patch.finishes)  # type: ignore[arg-type]
        x = start.clone()
        which.accumulate(x, y, linear, None)
        which.accumulate(x, y, linear, patch)
        found.append(x)
    assert_near(found[1], found[0], dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activates(kind: str) -> None:
    gate, up = on(5, 300), on(5, 300)
    for left in (gate, None):
        expected = REFERENCE.activate(left, up, kind)  # type: ignore[arg-type]
        assert_near(OPS.activate(left, up, kind), expected, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_in_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    x, norm = on(5, 40), Norm("rms", 1e-6, on(40))
    weights = [(on(30, 40) / 6).to(dtype) for _ in range(2)]
    found = []
    for which in (REFERENCE, OPS):
        linears = [Linear(which.matrix(weight)) for weight in weights]
        found.append(which.project_gated(x, norm, linears, (None, None), "silu"))
    assert found[1].dtype is dtype
    assert_near(found[1], found[0], dtype)


def test_adds_norms_gains_and_detours() -> None:
    start, y = on(6, 48), on(6, 48)
    norm = Norm("rms", 1e-6, on(48), None, (NormRows(1, 3, on(48)),))
    gains = (RowGain(0, 2, on(48)), RowGain(4, 5, on(48)))
    down, up = on(8, 48), on(48, 8)
    bias = on(8)
    found: list[Tensor] = []
    for which in (REFERENCE, OPS):
        x = start.clone()
        which.add_norm(x, y, norm)
        which.scale(x, gains)
        inner, outer = Linear(which.matrix(down), bias), Linear(which.matrix(up))
        which.detour(x, y, (Detour(1, 4, inner, outer, "relu", 0.7),))
        found.append(x)
    assert_near(found[1], found[0], torch.float32)


def test_embeds_and_finds_the_first_of_equal_logits() -> None:
    table, positions = on(50, 16), on(40, 16)
    place = geometry([2, 3], [10, 3], Shape(1, 1, 8))
    tokens = np.array([4, 4, 49, 0, 7])
    found = [
        which.embed(tokens, which.matrix(table), 2.0, which.matrix(positions), which.plan(place), 2)
        for which in (REFERENCE, OPS)
    ]
    assert_near(found[1], found[0], torch.float32)
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 1.0, 5.0]], device=DEVICE)
    assert OPS.argmax(logits).tolist() == [1, 0]
