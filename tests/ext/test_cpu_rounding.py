"""Native linear layers that may round what they multiply to bfloat16: only there, only once.

Bound: a row's error against the product of its rounded inputs, taken in float64, stays below 1e-5
of the row's norm, as without rounding.
"""

import pytest
import torch
from torch import Tensor

from ext.build import Isa, supported
from ext.cpu import CpuOps
from ext.ops import Linear, LoraSegment, Norm, Patch

BOUND = 1e-5

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")
ROUNDING = [isa for isa in supported() if isa in ("amx", "avx512bf16")]
needs_tiles = pytest.mark.skipif(not ROUNDING, reason="needs AMX or AVX-512 BF16")


@pytest.fixture(scope="module", params=ROUNDING)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param, rounding=True)


def weight(out: int, width: int) -> Tensor:
    return (torch.randn(out, width) / width**0.5).bfloat16()


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm(dim=-1)
    assert torch.all(error <= BOUND * expected.norm(dim=-1) + 1e-30), error.max()


def normalized(norm: Norm, x: Tensor) -> Tensor:
    """Rows as exact kernels multiply them: an identity gives them back."""
    exact = CpuOps(threads=1)
    identity = Linear(exact.matrix(torch.eye(x.shape[1]).bfloat16()))
    return exact.project(x, norm, (identity,), (None,))[0]


@needs_tiles
@pytest.mark.parametrize(("out", "width"), [(1, 1), (7, 3), (33, 65), (576, 577), (96, 1536)])
def test_rounds_its_inputs_once_and_nothing_else(ops: CpuOps, out: int, width: int) -> None:
    w, bias = weight(out, width), torch.randn(out)
    for rows in (*range(1, 20), 31, 33, 70, 257, 300):
        x = torch.randn(rows, width)
        (got,) = ops.project(x, None, (Linear(ops.matrix(w), bias),), (None,))
        assert_close(got, x.bfloat16().double() @ w.double().t() + bias)


@needs_tiles
def test_rounds_what_the_norm_gives(ops: CpuOps) -> None:
    x, norm = torch.randn(70, 576) * 3, Norm("rms", 1e-5, torch.rand(576) + 0.5)
    w = weight(64, 576)
    rounded = normalized(norm, x).bfloat16().double()
    (got,) = ops.project(x, norm, (Linear(ops.matrix(w)),), (None,))
    assert_close(got, rounded @ w.double().t())
    gate, up = weight(64, 576), weight(64, 576)
    layers = [Linear(ops.matrix(each)) for each in (gate, up)]
    inner = ops.project_gated(x, norm, layers, (None, None), "silu")
    gates, ups = (rounded @ each.double().t() for each in (gate, up))
    assert_close(inner, torch.nn.functional.silu(gates) * ups)


@needs_tiles
def test_a_rounded_row_has_the_same_bits_in_any_batch_on_any_number_of_threads(
    ops: CpuOps,
) -> None:
    width, norm = 1536, Norm("rms", 1e-5, torch.rand(1536) + 0.5)
    alone = CpuOps(threads=1, isa=ops.isa, rounding=True)
    x, residual = torch.randn(600, width), torch.randn(600, 80)
    down, *gated = (Linear(ops.matrix(weight(out, width))) for out in (80, 200, 200))

    def run(which: CpuOps, rows: slice) -> list[Tensor]:
        total = residual[rows].clone()
        which.accumulate(total, x[rows], down, None)
        inner = which.project_gated(x[rows], norm, gated, (None, None), "silu")
        return [total, inner, *which.project(x[rows], norm, (down,), (None,))]

    whole = run(ops, slice(0, 600))
    for got, expected in zip(run(alone, slice(0, 600)), whole, strict=True):
        assert torch.equal(got, expected)
    for rows in (1, 2, 15, 16, 17, 32, 33, 90, 257, 320):
        for begin in (0, 19, 600 - rows):
            part = slice(begin, begin + rows)
            for got, expected in zip(run(ops, part), whole, strict=True):
                assert torch.equal(got, expected[part]), (rows, begin)


@needs_tiles
@pytest.mark.parametrize("rank", [1, 8, 37])
@pytest.mark.parametrize("width", [96, 101])
def test_keeps_float32_factors_in_half_the_memory(ops: CpuOps, rank: int, width: int) -> None:
    x, w, (first, last) = torch.randn(40, width), weight(70, width), (3, 30)
    a, b = torch.randn(rank, width), torch.randn(70, rank)
    factors = ops.factor(a), ops.factor(b)
    assert {each.dtype for each in factors} == {torch.bfloat16}
    patch = Patch((LoraSegment(first, last, factors[0], factors[1], 0.5),))
    (got,) = ops.project(x, None, (Linear(ops.matrix(w)),), (patch,))
    expected = x.bfloat16().double() @ w.double().t()
    shrunk = x[first:last].bfloat16().double() @ a.bfloat16().double().t()
    expected[first:last] += 0.5 * shrunk @ b.bfloat16().double().t()
    assert_close(got, expected)


@pytest.mark.parametrize("isa", [isa for isa in supported() if isa not in ROUNDING])
def test_nothing_is_rounded_where_it_would_not_be_faster(isa: Isa) -> None:
    x, w = torch.randn(40, 96), weight(70, 96)
    exact, rounding = CpuOps(2, isa), CpuOps(2, isa, rounding=True)
    (expected,) = exact.project(x, None, (Linear(exact.matrix(w)),), (None,))
    (got,) = rounding.project(x, None, (Linear(rounding.matrix(w)),), (None,))
    assert torch.equal(got, expected)
