"""Weights of 8 and 4 bits: how near their codes are, and native products against the reference.

Bound of products: a row's error stays below 1e-5 of the row's norm, as for weights without codes,
plus 1e-6, since the parts of a single output (codes, offset, bias) may cancel each other.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Detour, Finish, Geometry, Linear, LoraSegment, Norm, Patch
from ext.quantize import GROUP, Bits, coded_bytes, quantize
from ext.reference import TorchOps

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

BOUND = 1e-5
BITS: tuple[Bits, ...] = ("int8", "int4")
REFERENCE = TorchOps()


@pytest.fixture(scope="module", params=supported())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param)


def weight(out: int, width: int) -> Tensor:
    return torch.randn(out, width) / width**0.5 + 0.1 * torch.randn(out, 1)


def lora(first: int, last: int, rank: int, width: int, out: int) -> LoraSegment:
    return LoraSegment(first, last, torch.randn(rank, width), torch.randn(out, rank), 0.5)


def linear(ops: CpuOps | TorchOps, w: Tensor, bits: Bits, bias: Tensor | None = None) -> Linear:
    return Linear(ops.coded(quantize(w, bits)), bias)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).norm(dim=-1)
    assert torch.all(error <= BOUND * expected.norm(dim=-1) + 1e-6), error.max()


def assert_projects(
    ops: CpuOps,
    x: Tensor,
    norm: Norm | None,
    weights: Sequence[tuple[Tensor, Bits | None]],
    patches: Sequence[Patch | None],
) -> None:
    def linears(which: CpuOps | TorchOps) -> list[Linear]:
        return [Linear(which.coded(quantize(w, b)) if b else which.matrix(w)) for w, b in weights]

    expected = REFERENCE.project(x, norm, linears(REFERENCE), patches)
    for got, right in zip(ops.project(x, norm, linears(ops), patches), expected, strict=True):
        assert_close(got, right)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("out", "width"), [(1, 1), (7, 3), (16, 32), (33, 65), (129, 100), (64, 64), (200, 577)]
)
def test_projects_every_number_of_rows(ops: CpuOps, bits: Bits, out: int, width: int) -> None:
    w, bias = weight(out, width), torch.randn(out)
    ours, theirs = linear(ops, w, bits, bias), linear(REFERENCE, w, bits, bias)
    for rows in (*range(1, 41), 97, 150, 300):
        x = torch.randn(rows, width)
        (expected,) = REFERENCE.project(x, None, [theirs], [None])
        assert_close(ops.project(x, None, [ours], [None])[0], expected)


@pytest.mark.parametrize("seed", range(12))
def test_projects_random_shapes(ops: CpuOps, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    out, width, rows = (int(torch.randint(1, top, (), generator=draw)) for top in (400, 700, 130))
    patch = Patch((lora(0, rows, 1 + seed, width, out),))
    norm = Norm("rms", 1e-5, torch.rand(width) + 0.5)
    for bits in BITS:
        assert_projects(ops, torch.randn(rows, width), norm, [(weight(out, width), bits)], [patch])


@pytest.mark.parametrize("bits", BITS)
def test_patches_and_norms_mix_with_layers_of_every_kind(ops: CpuOps, bits: Bits) -> None:
    width, outs = 130, (70, 33, 48)
    ranges = ((1, 2, 8), (2, 7, 16), (7, 8, 1), (20, 61, 24))
    segments = tuple(lora(a, b, rank, width, 70) for a, b, rank in ranges)
    finish = Finish(3, 40, torch.rand(70), torch.randn(70))
    patches = [Patch(segments, (finish,)), None, Patch((lora(0, 70, 5, width, 48),))]
    norm = Norm("layer", 1e-5, torch.rand(width) + 0.5, torch.randn(width))
    kinds = (bits, None, "int4")
    weights = [(weight(out, width), kind) for out, kind in zip(outs, kinds, strict=True)]
    for rows in (70, 110):
        assert_projects(ops, torch.randn(rows, width), norm, weights, patches)


@pytest.mark.parametrize("bits", BITS)
def test_gates_and_accumulates(ops: CpuOps, bits: Bits) -> None:
    gate, up, down = weight(90, 70), weight(90, 70), weight(70, 90)
    for rows in (1, 2, 9, 40, 120):
        x, y = torch.randn(rows, 70), torch.randn(rows, 90)
        pairs = [[linear(which, w, bits) for w in (gate, up)] for which in (ops, REFERENCE)]
        got, expected = (
            which.project_gated(x, None, pair, [None] * 2, "silu")
            for which, pair in zip((ops, REFERENCE), pairs, strict=True)
        )
        assert_close(got, expected)
        sums = [x.clone(), x.clone()]
        for which, target in zip((ops, REFERENCE), sums, strict=True):
            which.accumulate(target, y, linear(which, down, bits), None)
        assert_close(*sums)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_same_bits_whatever_shares_its_batch(ops: CpuOps, bits: Bits) -> None:
    x, layer = torch.randn(300, 391), linear(ops, weight(200, 391), bits, torch.randn(200))
    norm = Norm("rms", 1e-5, torch.rand(391) + 0.5)
    for how in (None, norm):
        (whole,) = ops.project(x, how, [layer], [None])
        for rows in (*range(1, 41), 97, 150):
            for begin in (0, 17, 300 - rows):
                (got,) = ops.project(x[begin : begin + rows], how, [layer], [None])
                assert torch.equal(got, whole[begin : begin + rows]), (rows, begin)


@pytest.mark.parametrize("bits", BITS)
def test_threads_do_not_change_bits(ops: CpuOps, bits: Bits) -> None:
    w, x = weight(500, 96), torch.randn(64, 96)
    alone = CpuOps(threads=1, isa=ops.isa)
    for rows in (1, 8, 64):
        (expected,) = alone.project(x[:rows], None, [linear(alone, w, bits)], [None])
        (got,) = ops.project(x[:rows], None, [linear(ops, w, bits)], [None])
        assert torch.equal(got, expected)


def test_codes_take_the_memory_that_was_told(ops: CpuOps) -> None:
    for bits, share in (("int8", 8.25 / 16), ("int4", 5 / 16)):
        matrix = ops.coded(quantize(weight(192, 640), bits))
        assert matrix.nbytes == coded_bytes((192, 640), bits) == share * 192 * 640 * 2
        assert (matrix.out_features, matrix.in_features) == (192, 640)


def test_codes_are_for_products_alone(ops: CpuOps) -> None:
    square = linear(ops, weight(8, 8), "int8")
    plan = ops.plan(
        Geometry(np.array([0, 1], "i4"), np.array([1], "i4"), np.zeros((1, 1, 1), "i4"))
    )
    with pytest.raises(ValueError, match="cannot be looked up in codes"):
        ops.embed(np.zeros(1, np.int64), square.weight, 1.0, None, plan, 0)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="a bottleneck's matrices cannot be codes"):
        ops.detour(x, x, [Detour(0, 2, square, square, "relu")])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 64, 577])
def test_no_code_is_further_off_than_half_a_step(
    bits: Bits, dtype: torch.dtype, width: int
) -> None:
    w = weight(50, width).to(dtype)
    before = w.clone()
    coded = quantize(w, bits)
    assert torch.equal(w, before)
    away = (coded.dense() - w.float()).abs()
    assert coded.lost == pytest.approx(float(away.square().sum()), rel=1e-4, abs=1e-12)
    assert coded.norm == pytest.approx(float(w.float().square().sum()), rel=1e-4)
    step = coded.scales.float().repeat_interleave(GROUP[bits], 1)[:, :width]
    if bits == "int8":
        # A rounded scale may leave the largest weight of a group just outside the codes.
        assert torch.all(away <= 0.5 * step * (1 + 1e-3) + 127 * step * 2**-8)
    assert (coded.lost / coded.norm) ** 0.5 < {"int8": 0.007, "int4": 0.08}[bits]
    again = quantize(coded.dense(), bits)
    assert (again.lost / again.norm) ** 0.5 < 0.005


@pytest.mark.parametrize("bits", BITS)
def test_equal_and_zero_weights_and_views_have_codes(ops: CpuOps, bits: Bits) -> None:
    assert torch.equal(quantize(torch.zeros(5, 40), bits).dense(), torch.zeros(5, 40))
    flat = quantize(torch.full((3, 70), 2.5), bits).dense()
    assert torch.all((flat - 2.5).abs() <= 2.5 * 2**-7)
    w = weight(40, 96)
    wide = torch.zeros(40, 192)
    wide[:, ::2] = w
    for view in (wide[:, ::2], w.t().contiguous().t()):
        assert torch.equal(quantize(view, bits).dense(), quantize(w, bits).dense())


def test_refuses_what_has_no_codes() -> None:
    for wrong in (torch.zeros(4, 0), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="has no codes"):
            quantize(wrong, "int8")
