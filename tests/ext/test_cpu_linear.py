"""Native linear layers against plain torch: packing, norms, biases, patches, embeddings.

Bound: a row's error stays below 1e-5 of the row's norm (float32 sums of up to some thousand terms).
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Geometry, Linear, LoraSegment, Norm, Patch
from ext.reference import TorchOps, normalize

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

BOUND = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE = TorchOps()


@pytest.fixture(scope="module", params=supported())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param)


def weight(out: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(out, width) / max(width, 1) ** 0.5).to(dtype)


def norm(kind: str, width: int, *, bias: bool = False) -> Norm:
    vectors = torch.rand(2, width) + 0.5
    return Norm(kind, 1e-5, vectors[0], vectors[1] if bias else None)  # type: ignore[arg-type]


def lora(first: int, last: int, rank: int, width: int, out: int) -> LoraSegment:
    return LoraSegment(first, last, torch.randn(rank, width), torch.randn(out, rank), 0.5)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).norm(dim=-1)
    assert torch.all(error <= BOUND * expected.norm(dim=-1) + 1e-30), error.max()


def assert_projects(
    ops: CpuOps,
    x: Tensor,
    norm: Norm | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    patches: Sequence[Patch | None],
) -> None:
    def linears(which: CpuOps | TorchOps) -> list[Linear]:
        return [Linear(which.matrix(w), b) for w, b in zip(weights, biases, strict=True)]

    expected = REFERENCE.project(x, norm, linears(REFERENCE), patches)
    for got, right in zip(ops.project(x, norm, linears(ops), patches), expected, strict=True):
        assert_close(got, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out", "width"), [(1, 1), (7, 3), (16, 8), (33, 65), (129, 100), (576, 577)]
)
def test_projects_every_number_of_rows(
    ops: CpuOps, dtype: torch.dtype, out: int, width: int
) -> None:
    w, b = weight(out, width, dtype), torch.randn(out)
    for rows in (*range(1, 26), 33, 70, 300):
        assert_projects(ops, torch.randn(rows, width), None, [w], [b], [None])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [1, 5, 17, 576])
def test_fuses_the_norm_with_several_layers(ops: CpuOps, kind: str, width: int) -> None:
    if kind == "layer" and width == 1:
        pytest.skip("the layer norm of one element is its bias")
    weights = [weight(out, width) for out in (40, 8, 9)]
    biases = [torch.randn(40), None, torch.randn(9)]
    for rows in (1, 6, 31, 120):
        x = torch.randn(rows, width) * 3 + 1
        for bias in (False, True) if kind == "layer" else (False,):
            assert_projects(ops, x, norm(kind, width, bias=bias), weights, biases, [None] * 3)


def test_packs_a_transposed_matrix_and_a_strided_view(ops: CpuOps) -> None:
    stored, x = weight(90, 70), torch.randn(5, 70)
    (expected,) = ops.project(x, None, [Linear(ops.matrix(stored))], [None])
    (turned,) = ops.project(
        x, None, [Linear(ops.matrix(stored.t().contiguous(), transposed=True))], [None]
    )
    wide = torch.zeros(90, 140, dtype=stored.dtype)
    wide[:, ::2] = stored
    (strided,) = ops.project(x, None, [Linear(ops.matrix(wide[:, ::2]))], [None])
    assert torch.equal(turned, expected)
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_loses_nothing_and_keeps_the_stored_width(ops: CpuOps, dtype: torch.dtype) -> None:
    stored = weight(100, 37, dtype)
    packed = ops.matrix(stored)
    plan = ops.plan(
        Geometry(np.array([0, 100], "i4"), np.array([100], "i4"), np.zeros((1, 1, 7), "i4"))
    )
    assert torch.equal(ops.embed(np.arange(100), packed, 1.0, None, plan, 0), stored.float())
    assert packed.nbytes <= 128 * 64 * stored.element_size()


def test_embeds_scaled_tokens_with_positions(ops: CpuOps) -> None:
    table, positions = weight(50, 33, torch.float16), weight(40, 33)
    geometry = Geometry(
        np.array([0, 3, 4], "i4"), np.array([10, 30], "i4"), np.zeros((2, 1, 2), "i4")
    )
    tokens = np.array([49, 0, 7, 7])
    expected = REFERENCE.embed(
        tokens,
        REFERENCE.matrix(table),
        1.5,
        REFERENCE.matrix(positions),
        REFERENCE.plan(geometry),
        2,
    )
    plan = ops.plan(geometry)
    got = ops.embed(tokens, ops.matrix(table), 1.5, ops.matrix(positions), plan, 2)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        ops.embed(np.array([0, 0, 0, 50]), ops.matrix(table), 1.0, None, plan, 0)
    with pytest.raises(ValueError, match="beyond the 40"):
        ops.embed(tokens, ops.matrix(table), 1.0, ops.matrix(positions), plan, 11)


def test_accumulates_into_the_residual(ops: CpuOps) -> None:
    w, bias = weight(64, 48), torch.randn(64)
    for rows in (1, 2, 9, 40):
        patch = Patch((lora(0, rows, 4, 48, 64),))
        x, y = torch.randn(rows, 64), torch.randn(rows, 48)
        expected, spread = x.clone(), torch.empty(rows, 128)
        spread[:, ::2] = x
        REFERENCE.accumulate(expected, y, Linear(REFERENCE.matrix(w), bias), patch)
        ops.accumulate(x, y, Linear(ops.matrix(w), bias), patch)
        ops.accumulate(spread[:, ::2], y, Linear(ops.matrix(w), bias), patch)
        assert_close(x, expected)
        assert torch.equal(spread[:, ::2], x)


@pytest.mark.parametrize(("kind", "width"), [("rms", 64), ("rms", 5376), ("layer", 391)])
def test_adds_what_it_normed_with_the_same_bits_in_any_batch(
    ops: CpuOps, kind: str, width: int
) -> None:
    how = norm(kind, width, bias=kind == "layer")
    x, y = torch.randn(2, 150, width)
    whole = x.clone()
    ops.add_norm(whole, y, how)
    bias = None if how.bias is None else how.bias.double()
    wide = Norm(how.kind, how.eps, how.weight.double(), bias)
    assert_close(whole.double(), x.double() + normalize(y.double(), wide))
    for rows in (1, 2, 3, 8, 40):
        for begin in (0, 17, 150 - rows):
            part = x[begin : begin + rows].clone()
            ops.add_norm(part, y[begin : begin + rows], how)
            assert torch.equal(part, whole[begin : begin + rows]), (rows, begin)


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 9, 16, 37, 64])
@pytest.mark.parametrize(("out", "width"), [(5, 3), (24, 40), (100, 77), (576, 64)])
def test_patches_every_rank(ops: CpuOps, rank: int, out: int, width: int) -> None:
    for rows, first, last in ((1, 0, 1), (9, 2, 8), (33, 0, 33), (130, 90, 111)):
        patch = Patch((lora(first, last, rank, width, out),))
        x = torch.randn(rows, width)
        assert_projects(
            ops, x, norm("rms", width), [weight(out, width)], [torch.randn(out)], [patch]
        )


def test_patches_mixed_ranks_over_sorted_rows_of_several_layers(ops: CpuOps) -> None:
    width, outs = 65, (70, 33, 16)
    ranges = ((1, 2, 8), (2, 7, 16), (7, 8, 1), (20, 61, 24))
    patches = [
        Patch(tuple(lora(a, b, rank, width, out) for a, b, rank in ranges)) for out in outs[:2]
    ]
    weights = [weight(out, width) for out in outs]
    for last in (None, Patch(())):
        for _ in range(2):  # the second call meets the prepared form
            assert_projects(
                ops, torch.randn(70, width), None, weights, [None] * 3, [*patches, last]
            )


def test_a_row_has_the_same_bits_whatever_shares_its_batch(ops: CpuOps) -> None:
    width, outs = 391, (200, 64)
    x = torch.randn(300, width)
    linears = [
        Linear(ops.matrix(weight(out, width, dtype)), torch.randn(out))
        for out, dtype in zip(outs, (torch.bfloat16, torch.float32), strict=True)
    ]
    factors = [lora(0, 1, 11, width, out) for out in outs]

    def project(rows: slice) -> list[Tensor]:
        part = x[rows]
        patches = [Patch((LoraSegment(0, len(part), s.a, s.b, s.scale),)) for s in factors]
        return ops.project(part, norms, linears, patches)

    norms = norm("rms", width)
    whole = project(slice(0, 300))
    for rows in (1, 2, 3, 5, 8, 13, 24, 40, 97, 150):
        for begin in (0, 17, 300 - rows):
            for got, expected in zip(project(slice(begin, begin + rows)), whole, strict=True):
                assert torch.equal(got, expected[begin : begin + rows]), (rows, begin)


def test_threads_do_not_change_bits(ops: CpuOps) -> None:
    w, x = weight(500, 96), torch.randn(64, 96)
    alone = CpuOps(threads=1, isa=ops.isa)
    for rows in (1, 8, 64):
        (expected,) = alone.project(x[:rows], None, [Linear(alone.matrix(w))], [None])
        (got,) = ops.project(x[:rows], None, [Linear(ops.matrix(w))], [None])
        assert torch.equal(got, expected)


def test_reads_misaligned_and_strided_rows(ops: CpuOps) -> None:
    w = weight(31, 29)
    memory = torch.randn(1 + 7 * 29)
    odd = memory[1:].view(7, 29)
    assert odd.data_ptr() % 8
    assert_projects(ops, odd, norm("layer", 29, bias=True), [w], [torch.randn(32)[1:]], [None])
    assert_projects(ops, torch.randn(29, 7).t(), None, [w], [None], [None])


def test_no_rows_give_no_results(ops: CpuOps) -> None:
    assert ops.project(torch.empty(0, 8), None, [Linear(ops.matrix(weight(4, 8)))], [None])[
        0
    ].shape == (0, 4)


def test_refuses_what_does_not_fit(ops: CpuOps) -> None:
    layer = Linear(ops.matrix(weight(4, 8)))
    with pytest.raises(ValueError, match="rows of 9 for a layer of 8 inputs"):
        ops.project(torch.randn(2, 9), None, [layer], [None])
    with pytest.raises(ValueError, match=r"must be float32, not torch\.float64"):
        ops.project(torch.randn(2, 8).double(), None, [layer], [None])
    with pytest.raises(ValueError, match="cannot take"):
        ops.accumulate(torch.randn(2, 5), torch.randn(2, 8), layer, None)
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        ops.matrix(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="has no weights"):
        ops.matrix(torch.zeros(4, 0))
