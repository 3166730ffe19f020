"""Native attachments against plain torch: low-rank pieces, gains, biases, norms and bottlenecks of
some rows of a batch. Bounds as in test_cpu_linear."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Detour, Finish, Linear, LoraSegment, Norm, NormRows, Patch, RowGain
from ext.reference import TorchOps

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

BOUND = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE = TorchOps()
CURVES = ("relu", "silu", "gelu", "gelu_tanh", "tanh", "none")


@pytest.fixture(scope="module", params=supported())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).norm(dim=-1)
    assert torch.all(error <= BOUND * expected.norm(dim=-1) + 1e-30), error.max()


def matrix(out: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(out, width) / width**0.5).to(dtype)


def runs(rng: random.Random, rows: int, count: int) -> list[tuple[int, int]]:
    """Sorted, disjoint runs of rows, some of them neighbours."""
    cuts = sorted(rng.sample(range(rows + 1), min(2 * count, rows + 1)))
    return [run for i, run in enumerate(pairwise(cuts)) if i % 2 == 0 or rng.random() < 0.3]


def segment(
    which: CpuOps | TorchOps, run: tuple[int, int], a: Tensor, b: Tensor, scale: float = 0.5
) -> LoraSegment:
    return LoraSegment(*run, which.factor(a), which.factor(b), scale)


def assert_patches(
    ops: CpuOps,
    x: Tensor,
    layer: tuple[Tensor, Tensor | None],
    pieces: list[tuple[tuple[int, int], Tensor, Tensor]],
    finishes: tuple[Finish, ...] = (),
) -> None:
    """Projects and accumulates with the same patch in both implementations."""
    weight, bias = layer
    found = []
    for which in (REFERENCE, ops):
        linear = Linear(which.matrix(weight), bias)
        patch = Patch(tuple(segment(which, *piece) for piece in pieces), finishes)
        (projected,) = which.project(x, None, [linear], [patch])
        residual = torch.ones(len(x), len(weight))
        which.accumulate(residual, x, linear, patch)
        found.append((projected, residual))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(5, 3), (100, 77), (64, 64)])
def test_every_rank_in_every_precision(
    ops: CpuOps, dtype: torch.dtype, out: int, width: int
) -> None:
    w = matrix(out, width)
    for rank in range(1, 66):
        for rows, first, last in ((1, 0, 1), (9, 2, 8), (130, 90, 111)):
            piece = ((first, last), matrix(rank, width, dtype), matrix(out, rank, dtype))
            assert_patches(ops, torch.randn(rows, width), (w, None), [piece])


def test_the_two_factors_may_differ_in_precision(ops: CpuOps) -> None:
    for a in DTYPES:
        for b in DTYPES:
            piece = ((3, 17), matrix(12, 50, a), matrix(40, 12, b))
            assert_patches(ops, torch.randn(20, 50), (matrix(40, 50), None), [piece])


def test_factors_that_were_never_laid_out_are_turned(ops: CpuOps) -> None:
    w, x = matrix(40, 24), torch.randn(6, 24)
    for rank in (3, 40, 64):  # beyond the width, A lies in panels and B in rows
        a, b = matrix(rank, 24), matrix(40, rank)
        results = []
        for pair in ((a, b), (ops.factor(a), ops.factor(b))):
            patch = Patch((LoraSegment(1, 5, *pair, 0.5),))
            results.append(ops.project(x, None, [Linear(ops.matrix(w))], [patch])[0])
        assert torch.equal(*results)


def test_factors_keep_their_bytes(ops: CpuOps) -> None:
    a, b = ops.factor(matrix(8, 576)), ops.factor(matrix(576, 8))
    assert a.dtype is b.dtype is torch.bfloat16
    assert a.nbytes == b.nbytes == 2 * 8 * 576


@pytest.mark.parametrize("seed", range(12))
def test_mixed_and_overlapping_pieces(ops: CpuOps, seed: int) -> None:
    rng = random.Random(seed)
    rows = rng.choice((1, 2, 5, 13, 32, 97, 200))
    out, width = rng.randint(1, 150), rng.randint(1, 150)
    pieces = []
    for _ in range(rng.randint(0, 9)):
        first = rng.randrange(rows)
        rank, dtype = rng.randint(1, 40), rng.choice(DTYPES)
        run = (first, rng.randint(first + 1, rows))
        pieces.append((run, matrix(rank, width, dtype), matrix(out, rank, dtype)))
    finishes = tuple(
        Finish(
            *run,
            torch.rand(out) if rng.random() < 0.7 else None,
            torch.randn(out) if rng.random() < 0.5 else None,
        )
        for run in runs(rng, rows, rng.randint(0, 4))
    )
    bias = torch.randn(out) if rng.random() < 0.5 else None
    dtype = rng.choice(DTYPES)
    assert_patches(
        ops, torch.randn(rows, width), (matrix(out, width, dtype), bias), pieces, finishes
    )


def test_rows_end_in_their_own_gain_and_bias(ops: CpuOps) -> None:
    out, width = 70, 33
    gain, bias = torch.rand(out) + 0.5, torch.randn(out)
    for own in (None, torch.randn(out)):
        finishes = (Finish(0, 2, gain), Finish(2, 3, None, bias), Finish(5, 9, gain, bias))
        assert_patches(ops, torch.randn(12, width), (matrix(out, width), own), [], finishes)
    odd = torch.randn(out + 1)[1:]
    assert odd.data_ptr() % 8
    whole = (Finish(0, 150, odd, odd),)
    assert_patches(ops, torch.randn(150, width), (matrix(out, width), None), [], whole)


def own_norm(kind: str, width: int, rng: random.Random, rows: int) -> Norm:
    """A norm with other weights for some rows."""
    bias = torch.randn(width) if kind == "layer" else None
    own = tuple(
        NormRows(*run, torch.rand(width) + 0.5, bias if rng.random() < 0.5 else None)
        for run in runs(rng, rows, 3)
    )
    return Norm(kind, 1e-5, torch.rand(width) + 0.5, bias, own)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [3, 64, 201])
def test_rows_are_normed_with_their_own_weights(ops: CpuOps, kind: str, width: int) -> None:
    rng = random.Random(width)
    for rows in (1, 2, 7, 33, 140):
        x, w = torch.randn(rows, width), matrix(40, width)
        norm = own_norm(kind, width, rng, rows)
        (expected,) = REFERENCE.project(x, norm, [Linear(REFERENCE.matrix(w))], [None])
        (got,) = ops.project(x, norm, [Linear(ops.matrix(w))], [None])
        assert_close(got, expected)
        sums = torch.randn(2, rows, width)
        wanted = sums[0].clone()
        REFERENCE.add_norm(wanted, sums[1], norm)
        ops.add_norm(sums[0], sums[1], norm)
        assert_close(sums[0], wanted)


def test_fuses_the_gate(ops: CpuOps) -> None:
    width, out = 65, 70
    weights, bias = [matrix(out, width) for _ in range(2)], torch.randn(out)
    linears = [Linear(ops.matrix(w), b) for w, b in zip(weights, (None, bias), strict=True)]
    for rows in (0, 1, 8, 32, 120):
        x = torch.randn(rows, width)
        norm = own_norm("rms", width, random.Random(rows), rows) if rows else None
        patch = None
        if rows:
            patch = Patch((segment(ops, (0, rows), matrix(7, width), matrix(out, 7)),))
        for kind in ("silu", "gelu", "gelu_tanh"):
            for patches in ((patch, None), (None, patch), (None, None)):
                gate, up = ops.project(x, norm, linears, patches)
                fused = ops.project_gated(x, norm, linears, patches, kind)
                assert torch.equal(fused, ops.activate(gate, up, kind))
    narrow = Linear(ops.matrix(weights[0][1:]))
    with pytest.raises(ValueError, match="a gate of 69 outputs for 70"):
        ops.project_gated(torch.randn(1, width), None, (narrow, linears[1]), (None, None), "silu")


@pytest.mark.parametrize("width", [1, 5, 96, 1537])
def test_scales_rows(ops: CpuOps, width: int) -> None:
    for rows in (1, 6, 40):
        rng = random.Random(rows)
        gains = [RowGain(*run, torch.randn(width)) for run in runs(rng, rows, 3)]
        x = torch.randn(rows, 2 * width)[:, :width]
        expected = x.clone()
        REFERENCE.scale(expected, gains)
        ops.scale(x, gains)
        assert torch.equal(x, expected)
        ops.scale(x, [])
        assert torch.equal(x, expected)


def bottleneck(
    which: CpuOps | TorchOps, run: tuple[int, int], tensors: tuple[Tensor, ...], curve: str
) -> Detour:
    down, up, inner, outer = tensors
    return Detour(
        *run, Linear(which.matrix(down), inner), Linear(which.matrix(up), outer), curve, 0.7
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("width", "size"), [(64, 16), (77, 1), (9, 65), (200, 33)])
def test_detours(ops: CpuOps, curve: str, width: int, size: int) -> None:
    rng = random.Random(width)
    for rows in (1, 2, 14, 60):
        made = []
        for run in runs(rng, rows, 4):
            dtype = rng.choice(DTYPES)
            biases = (torch.randn(size), torch.randn(width)) if rng.random() < 0.5 else (None,) * 2
            made.append((run, (matrix(size, width, dtype), matrix(width, size, dtype), *biases)))
        x, z = torch.randn(2, rows, width)
        for aliased in (False, True):
            results = []
            for which in (REFERENCE, ops):
                target = x.clone()
                detours = [bottleneck(which, run, tensors, curve) for run, tensors in made]
                which.detour(target, target if aliased else z, detours)
                results.append(target)
            assert_close(results[1], results[0])


def test_tanh_is_good_to_a_few_ten_millionths_of_its_value(ops: CpuOps) -> None:
    z = torch.cat((torch.linspace(-10, 10, 5001), torch.linspace(-1e-3, 1e-3, 101)))[:, None]
    one = Linear(ops.matrix(torch.ones(1, 1)))
    x = torch.zeros_like(z)
    ops.detour(x, z, [Detour(0, len(z), one, one, "tanh")])
    right = z.double().tanh()
    assert ((x - right).abs() <= 4e-7 * right.abs() + 1e-38).all()


def test_a_row_has_the_same_bits_whatever_shares_its_batch(ops: CpuOps) -> None:
    width, out, rows = 96, 70, 150
    x = torch.randn(rows, width)
    linear = Linear(ops.matrix(matrix(out, width)), torch.randn(out))
    square = Linear(ops.matrix(matrix(out, width)))
    back = Linear(ops.matrix(matrix(width, out)))
    gain, norm = torch.rand(out), Norm("rms", 1e-5, torch.ones(width))
    own = NormRows(0, 1, torch.rand(width))
    pieces = [segment(ops, (0, 1), matrix(r, width), matrix(out, r)) for r in (5, 33)]

    def run(which: CpuOps, first: int, last: int) -> tuple[Tensor, ...]:
        count = last - first
        rest = tuple(replace(s, last=count) for s in pieces)
        patch = Patch(rest, (Finish(0, count, gain),))
        mine = replace(norm, rows=(replace(own, last=count),))
        (y,) = which.project(x[first:last], mine, [linear], [patch])
        z = x[first:last].clone()
        which.scale(z, [RowGain(0, count, own.weight)])
        which.detour(z, z, [Detour(0, count, square, back, "silu")])
        which.add_norm(z, x[first:last], mine)
        return y, z

    whole = run(ops, 0, rows)
    alone = CpuOps(threads=1, isa=ops.isa)
    for count in (1, 2, 3, 4, 5, 8, 13, 40, 97):
        for first in (0, 17, rows - count):
            for which in (ops, alone):
                for got, right in zip(run(which, first, first + count), whole, strict=True):
                    assert torch.equal(got, right[first : first + count]), (count, first)


def test_refuses_what_does_not_fit(ops: CpuOps) -> None:
    linear, x = Linear(ops.matrix(matrix(40, 8))), torch.randn(4, 8)

    def project(patch: Patch, norm: Norm | None = None) -> None:
        ops.project(x, norm, [linear], [patch])

    a, b = matrix(2, 8), matrix(40, 2)
    for wrong in ((matrix(2, 9), b), (matrix(3, 8), b), (a, matrix(30, 2)), (a, matrix(100, 2))):
        with pytest.raises(ValueError, match="for a layer of 8 inputs and 40 outputs"):
            project(Patch((segment(ops, (0, 1), *wrong),)))
    with pytest.raises(ValueError, match="a patch up to row 5 for 4 rows"):
        project(Patch((segment(ops, (0, 5), a, b),)))
    with pytest.raises(ValueError, match="rows 3 to 3"):
        project(Patch((segment(ops, (3, 3), a, b),)))
    with pytest.raises(ValueError, match="rows 1 to 3"):
        project(Patch((), (Finish(0, 2, torch.ones(40)), Finish(1, 3, torch.ones(40)))))
    with pytest.raises(ValueError, match=r"a gain of \(39,\)"):
        project(Patch((), (Finish(0, 2, torch.ones(39)),)))
    with pytest.raises(ValueError, match=r"a bias of \(40,\) torch\.float64"):
        project(Patch((), (Finish(0, 2, None, torch.ones(40).double()),)))
    with pytest.raises(ValueError, match="rows 2 to 5 of 4"):
        project(Patch(()), Norm("rms", 1e-5, torch.ones(8), None, (NormRows(2, 5, torch.ones(8)),)))
    with pytest.raises(ValueError, match=r"a norm of \(7,\)"):
        project(Patch(()), Norm("rms", 1e-5, torch.ones(8), None, (NormRows(0, 1, torch.ones(7)),)))
    with pytest.raises(ValueError, match=r"a gain of \(9,\)"):
        ops.scale(x, [RowGain(0, 1, torch.ones(9))])
    with pytest.raises(ValueError, match="a bottleneck of 8 to 40 for rows of 8"):
        ops.detour(x, x, [Detour(0, 1, linear, linear, "relu")])
    with pytest.raises(ValueError, match=r"\(4, 8\) cannot take"):
        ops.add_norm(x, x[:, 1:], Norm("rms", 1e-5, torch.ones(8)))
