"""Native attention over pages against plain torch, with bounds as in test_cpu_linear; where it
rounds to bfloat16, against float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Attention, Cache, Geometry, Norm, NormRows, Place
from ext.reference import TorchOps

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

BOUND = 1e-5
REFERENCE = TorchOps()


@pytest.fixture(scope="module", params=supported())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param)


@pytest.fixture(scope="module", params=supported())
def rounding(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param, rounding=True)


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    page: int = 16
    layers: int = 2


def geometry(new: list[int], contexts: list[int], shape: Shape, seed: int = 0) -> Geometry:
    """Sequences of `contexts` tokens whose last `new` ones are the rows, on shuffled pages."""
    rng = np.random.default_rng(seed)
    pages = max(-(-context // shape.page) for context in contexts) + 1
    shuffled = rng.permutation(len(contexts) * shape.layers * pages)
    tables = shuffled.reshape(len(contexts), shape.layers, pages).astype("i4")
    starts = np.concatenate([[0], np.cumsum(new)]).astype("i4")
    return Geometry(starts, np.array(contexts, "i4"), tables)


def filled_cache(place: Geometry, shape: Shape) -> Cache:
    """Random pages, but NaN where nothing was written: beyond each sequence's earlier context."""
    data = torch.randn(place.tables.size, 2, shape.page, shape.kv_heads, shape.dim)
    counts = np.diff(place.starts)
    for i, context in enumerate(place.contexts):
        for page, ids in enumerate(place.tables[i].T):
            written = int(context - counts[i]) - page * shape.page
            if written < shape.page:
                data[torch.from_numpy(ids.astype("i8")), :, max(written, 0) :] = torch.nan
    return Cache(data, shape.page)


def assert_attends(
    ops: CpuOps,
    new: list[int],
    contexts: list[int],
    shape: Shape,
    *,
    window: int | None = None,
    norms: tuple[Norm | None, Norm | None] = (None, None),
    rotary: tuple[int, bool] | None = None,
) -> None:
    place = geometry(new, contexts, shape)
    rows = place.num_rows
    q = torch.randn(rows, shape.heads * shape.dim)
    k, v = torch.randn(2, rows, shape.kv_heads * shape.dim)
    cache = filled_cache(place, shape)
    results = []
    for which in (REFERENCE, ops):
        turn = None
        if rotary is not None:
            turn = which.rotary(
                [10000 ** (-i / rotary[0]) for i in range(rotary[0])], 1.1, rotary[1], 1100
            )
        own = Cache(cache.data.clone(), shape.page)
        how = Attention(shape.dim**-0.5, turn, norms[0], norms[1], window)
        out = which.attend(q, k, v, how, Place(own, 1, which.plan(place)))
        results.append((out, own.data))
    (expected, expected_pages), (got, pages) = results
    # A mean of values can cancel to almost nothing: the bound is never below that of a small row.
    bound = BOUND * expected.norm(dim=1).clamp(min=0.1 * shape.dim**0.5)
    assert torch.all((got - expected).norm(dim=1) <= bound)
    torch.testing.assert_close(pages, expected_pages, rtol=1e-5, atol=1e-5, equal_nan=True)


SHAPES = [
    Shape(9, 3, 64),
    Shape(4, 4, 8),
    Shape(8, 1, 80),
    Shape(4, 2, 5),
    Shape(6, 3, 96),
    Shape(2, 1, 128),
    Shape(14, 2, 20, page=8),
    Shape(1, 1, 1, page=5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_across_page_and_span_borders(ops: CpuOps, shape: Shape) -> None:
    assert_attends(ops, [1] * 8, [1, 15, 16, 17, 127, 128, 129, 400], shape)
    assert_attends(ops, [1], [700], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefills_chunks_beside_decodes(ops: CpuOps, shape: Shape) -> None:
    assert_attends(ops, [1, 5, 130, 1, 8, 9], [33, 5, 130, 1, 140, 300], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_last_rows_attend_once_the_keys_of_all_are_written(ops: CpuOps, shape: Shape) -> None:
    new, contexts, wanted = [1, 5, 130, 9], [33, 5, 130, 300], [1, 1, 2, 9]
    place = geometry(new, contexts, shape)
    last = np.concatenate(
        [np.arange(end - n, end) for end, n in zip(place.starts[1:], wanted, strict=True)]
    )
    narrow = Geometry(np.cumsum([0, *wanted]).astype("i4"), place.contexts, place.tables)
    q = torch.randn(place.num_rows, shape.heads * shape.dim)
    k, v = torch.randn(2, place.num_rows, shape.kv_heads * shape.dim)
    norm = Norm("rms", 1e-6, torch.randn(shape.dim))
    for which in (REFERENCE, ops):
        turn = which.rotary([0.1] * (shape.dim // 2), 1.0, False, 300)
        how = Attention(shape.dim**-0.5, turn, norm, norm, window=200)
        whole = filled_cache(place, shape)
        apart = Cache(whole.data.clone(), shape.page)
        expected = which.attend(q, k, v, how, Place(whole, 1, which.plan(place)))
        which.append(k, v, how, Place(apart, 1, which.plan(place)))
        rows = torch.from_numpy(last)
        got = which.attend(q[rows], None, None, how, Place(apart, 1, which.plan(narrow)))
        assert torch.equal(apart.data.nan_to_num(), whole.data.nan_to_num())
        if which is ops:
            assert torch.equal(got, expected[rows])
        else:
            torch.testing.assert_close(got, expected[rows])


def test_prefills_a_long_chunk(ops: CpuOps) -> None:
    assert_attends(ops, [300], [300], Shape(6, 2, 32))
    assert_attends(ops, [257], [1025], Shape(6, 2, 32))


@pytest.mark.parametrize("window", [1, 2, 7, 16, 100, 128, 129, 1000])
def test_sees_only_the_window(ops: CpuOps, window: int) -> None:
    assert_attends(ops, [1, 150, 1, 3], [400, 300, 17, 130], Shape(6, 2, 16), window=window)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 10), (10, 5), (33, 16), (16, 1)])
def test_rotates_whole_and_partial_heads(
    ops: CpuOps, dim: int, half: int, interleaved: bool
) -> None:
    shape = Shape(4, 2, dim)
    assert_attends(ops, [1, 20, 1], [1000, 21, 3], shape, rotary=(half, interleaved))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_normalizes_heads(ops: CpuOps, kind: str) -> None:
    norms = [Norm(kind, 1e-6, torch.rand(24) + 0.5, None) for _ in range(2)]  # type: ignore[arg-type]
    assert_attends(
        ops, [1, 9], [40, 30], Shape(4, 2, 24), norms=(norms[0], norms[1]), rotary=(12, False)
    )
    assert_attends(ops, [1, 9], [40, 30], Shape(4, 2, 24), norms=(None, norms[1]))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_normalizes_heads_of_some_rows_with_their_own_weights(ops: CpuOps, kind: str) -> None:
    def own(first: int, last: int) -> NormRows:
        return NormRows(first, last, torch.rand(24) + 0.5, torch.randn(24) if last > 5 else None)

    weight, bias = torch.rand(24) + 0.5, torch.randn(24) if kind == "layer" else None
    norms = [
        Norm(kind, 1e-6, weight, bias, tuple(own(*run) for run in rows))  # type: ignore[arg-type]
        for rows in (((0, 2), (2, 3), (7, 10)), ((4, 9),))
    ]
    if kind == "rms":
        norms = [replace(n, rows=tuple(replace(row, bias=None) for row in n.rows)) for n in norms]
    assert_attends(
        ops, [1, 9], [40, 30], Shape(4, 2, 24), norms=(norms[0], norms[1]), rotary=(12, False)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_and_writes_half_wide_pages(ops: CpuOps, shape: Shape) -> None:
    place = geometry([1, 5, 130, 1, 64], [400, 5, 130, 17, 300], shape)
    q = torch.randn(place.num_rows, shape.heads * shape.dim)
    k, v = torch.randn(2, place.num_rows, shape.kv_heads * shape.dim).bfloat16().float()
    data = filled_cache(place, shape).data.bfloat16()
    results = []
    for which in (REFERENCE, ops):
        own = Cache(data.clone(), shape.page)
        out = which.attend(q, k, v, Attention(0.3), Place(own, 1, which.plan(place)))
        results.append((out, own.data))
    (expected, expected_pages), (got, pages) = results
    assert torch.equal(pages.nan_to_num(9.0), expected_pages.nan_to_num(9.0))
    bound = BOUND * expected.norm(dim=1).clamp(min=0.1 * shape.dim**0.5)
    assert torch.all((got - expected).norm(dim=1) <= bound)


def test_rounds_to_half_wide_pages_as_torch_does(ops: CpuOps) -> None:
    place = geometry([1], [1], Shape(1, 1, 4096, layers=1))
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, -1, 1])
    bits[: len(ties)] = ties.to(torch.int32)
    v = bits.view(torch.float32)[None]
    cache = Cache(torch.zeros(place.tables.size, 2, 16, 1, 4096, dtype=torch.bfloat16))
    ops.attend(v.clone().zero_(), v, v, Attention(1.0), Place(cache, 0, ops.plan(place)))
    written = cache.data[int(place.tables[0, 0, 0]), 1, 0, 0]
    assert torch.equal(written.nan_to_num(9.0), v[0].bfloat16().nan_to_num(9.0))
    with pytest.raises(ValueError, match=r"pages must be float32 or bfloat16, not torch\.float16"):
        ops.attend(v, v, v, Attention(1.0), Place(Cache(cache.data.half()), 0, ops.plan(place)))


def attend(
    ops: CpuOps, qkv: list[Tensor], place: Geometry, cache: Cache, window: int | None
) -> Tensor:
    return ops.attend(*qkv, Attention(0.2, window=window), Place(cache, 0, ops.plan(place)))


def pages(
    ops: CpuOps,
    count: int,
    page: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Cache:
    """KV pages in memory of the kernels' own."""
    size = dtype.itemsize * count * 2 * page * kv_heads * dim
    data = ops.memory(size).view(dtype).view(count, 2, page, kv_heads, dim)
    return Cache(data, page)


def assert_same_bits(
    ops: CpuOps, alone: CpuOps, shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    """A row's bits depend neither on how its prompt is cut nor on the batch nor on threads."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    place = geometry([300, 300, 300], [300, 300, 300], shape)
    qkv = [torch.randn(900, count * shape.dim) for count in heads]
    cache = pages(ops, place.tables.size, shape.page, shape.kv_heads, shape.dim, dtype)
    whole = attend(ops, qkv, place, cache, window)
    for row in (0, 7, 8, 127, 128, 200, 299):
        one = Geometry(np.array([0, 1], "i4"), np.array([row + 1], "i4"), place.tables[1:2])
        rows = [t[300 + row : 301 + row] for t in qkv]
        for which in (ops, alone):
            assert torch.equal(attend(which, rows, one, cache, window)[0], whole[300 + row])
    for first, last in ((160, 250), (127, 129), (200, 203)):
        bounds = np.array([0, last - first], "i4"), np.array([last], "i4")
        chunk = Geometry(*bounds, place.tables[2:])
        rows = [t[600 + first : 600 + last] for t in qkv]
        assert torch.equal(attend(ops, rows, chunk, cache, window), whole[600 + first : 600 + last])
    mixed = Geometry(np.array([0, 40, 41], "i4"), np.array([250, 300], "i4"), place.tables[1:])
    rows = [torch.cat((t[510:550], t[899:900])) for t in qkv]
    assert torch.equal(
        attend(ops, rows, mixed, cache, window), torch.cat((whole[510:550], whole[899:]))
    )


@pytest.mark.parametrize(
    ("window", "dtype"), [(None, torch.float32), (50, torch.float32), (None, torch.bfloat16)]
)
def test_a_row_has_the_same_bits_in_prefill_decode_and_any_batch(
    ops: CpuOps, window: int | None, dtype: torch.dtype
) -> None:
    alone = CpuOps(threads=1, isa=ops.isa)
    assert_same_bits(ops, alone, Shape(6, 2, 40, layers=1), window, dtype)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", [Shape(9, 3, 64), Shape(4, 2, 40, page=5)], ids=str)
def test_a_row_has_the_same_bits_wherever_it_is_rounded(
    rounding: CpuOps, shape: Shape, window: int | None
) -> None:
    alone = CpuOps(threads=1, isa=rounding.isa, rounding=True)
    assert_same_bits(rounding, alone, replace(shape, layers=1), window, torch.bfloat16)


def exact_attention(
    q: Tensor, place: Geometry, cache: Cache, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries already scaled over what pages hold, in float64, and the same of the
    values' sizes: [rows, heads, dim]."""
    out, sizes = torch.zeros((2, *q.shape), dtype=torch.float64)
    rows = iter(range(len(q)))
    for i, context in enumerate(place.contexts):
        held = cache.data[torch.from_numpy(place.tables[i, 0].astype("i8"))].double()
        k, v = held.transpose(0, 1).flatten(1, 2).repeat_interleave(q.shape[1] // held.shape[3], 2)
        for position in range(context - place.starts[i + 1] + place.starts[i], context):
            row, low = next(rows), max(0, position + 1 - (window or context))
            seen = slice(low, position + 1)
            weights = torch.einsum("hd,phd->hp", q[row].double() * scale, k[seen]).softmax(1)
            out[row] = torch.einsum("hp,phd->hd", weights, v[seen])
            sizes[row] = torch.einsum("hp,phd->hd", weights, v[seen].abs())
    return out, sizes


@pytest.mark.parametrize("window", [None, 3, 140])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_queries_and_weights_alone(
    rounding: CpuOps, shape: Shape, window: int | None
) -> None:
    shape = replace(shape, layers=1)
    place = geometry([1, 5, 40, 1, 33], [400, 5, 40, 17, 300], shape)
    q = torch.randn(place.num_rows, shape.heads * shape.dim)
    k, v = torch.randn(2, place.num_rows, shape.kv_heads * shape.dim)
    cache = Cache(filled_cache(place, shape).data.bfloat16(), shape.page)
    how = Attention(0.5, window=window)
    got = rounding.attend(q, k, v, how, Place(cache, 0, rounding.plan(place)))
    if rounding.isa not in ("amx", "avx512bf16"):
        plain = CpuOps(threads=2, isa=rounding.isa)
        expected = plain.attend(q, k, v, how, Place(cache, 0, plain.plan(place)))
        assert torch.equal(got, expected)
        return
    heads = q.view(place.num_rows, shape.heads, shape.dim)
    expected, sizes = exact_attention(heads.bfloat16(), place, cache, 0.5, window)
    # Half a step of bfloat16 for each weight, in the sum of the values and in what divides it.
    error = (got.view(heads.shape) - expected).abs()
    assert torch.all(error <= 2 * 2**-8 * sizes + 1e-5)
    unrounded, _ = exact_attention(heads, place, cache, 0.5, window)
    assert (got.view(heads.shape) - unrounded).norm() > 1e-4 * expected.norm()


def test_does_not_round_what_float32_pages_hold(rounding: CpuOps) -> None:
    shape = Shape(9, 3, 64, layers=1)
    place = geometry([1, 40], [300, 170], shape)
    qkv = [torch.randn(41, heads * 64) for heads in (9, 3, 3)]
    cache = filled_cache(place, shape)
    plain = CpuOps(threads=2, isa=rounding.isa)
    assert torch.equal(
        attend(rounding, qkv, place, cache, None), attend(plain, qkv, place, cache, None)
    )


def test_cache_memory_is_committed_as_written(ops: CpuOps) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    cache = pages(ops, 20_000, 16, 3, 64)
    assert cache.data.shape == (20_000, 2, 16, 3, 64)
    assert cache.data.nbytes > 450 << 20
    cache.data[7] = 1.0
    assert resident() - before < 16 << 20


def test_refuses_what_was_not_prepared(ops: CpuOps) -> None:
    place = geometry([2], [40], Shape(2, 1, 8))
    plan, cache = ops.plan(place), pages(ops, 8, 16, 1, 8)
    q, kv = torch.randn(2, 16), torch.randn(2, 8)
    how, turned = Attention(1.0), Attention(1.0, ops.rotary([1.0], 1.0, False, 39))
    with pytest.raises(ValueError, match="layer 2 or position 39"):
        ops.attend(q, kv, kv, how, Place(cache, 2, plan))
    with pytest.raises(ValueError, match="layer 0 or position 39"):
        ops.attend(q, kv, kv, turned, Place(cache, 0, plan))
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        ops.attend(q[:1], kv[:1], kv[:1], how, Place(cache, 0, plan))
