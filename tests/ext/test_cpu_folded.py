"""bfloat16 weights in folded matrices: nothing is lost, whatever they are, and no bit of a product
depends on whether a bundle could be folded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Geometry, Linear
from ext.packing import CpuMatrix

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

_OTHERS = 11  # of one block, at most


@pytest.fixture(
    scope="module",
    params=[(isa, rounding) for isa in supported() if isa != "amx" for rounding in (False, True)],
    ids=str,
)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    isa, rounding = request.param
    return CpuOps(threads=2, isa=isa, rounding=rounding)


def trained(out: int, width: int) -> Tensor:
    """Like what training leaves: normal, some of them zero."""
    weight = torch.randn(out, width) / width**0.5
    weight[torch.rand(out, width) < 0.01] = 0
    return weight.bfloat16()


def scattered(out: int, width: int) -> Tensor:
    """Of all sizes: no block has few high bytes."""
    return (torch.randn(out, width) * torch.exp2(torch.randint(-60, 60, (out, width)))).bfloat16()


def spotted(out: int, width: int) -> Tensor:
    """As trained, but blocks here and there have a few far smaller weights."""
    weight = trained(out, width)
    weight[40 % out :: 72, ::11] *= 2.0**-50
    return weight


def rows(ops: CpuOps, matrix: CpuMatrix) -> Tensor:
    count = matrix.out_features
    plan = ops.plan(
        Geometry(
            np.array([0, count], "i4"),
            np.array([count], "i4"),
            np.zeros((1, 1, -(-count // 16)), "i4"),
        )
    )
    return ops.embed(np.arange(count), matrix, 1.0, None, plan, 0)


def project(ops: CpuOps, x: Tensor, weight: Tensor) -> Tensor:
    return ops.project(x, None, [Linear(ops.matrix(weight))], [None])[0]


@pytest.mark.parametrize("width", [64, 192, 576, 1000])
@pytest.mark.parametrize("out", [1, 33, 192, 576, 1000])
def test_nothing_is_lost(ops: CpuOps, out: int, width: int) -> None:
    mixed = torch.cat((trained(out, width), scattered(out, width)))
    plain = (trained(out, width), spotted(out, width), scattered(out, width))
    for weight in (*plain, mixed, mixed[::2], mixed.flip(0)):
        assert torch.equal(rows(ops, ops.matrix(weight)), weight.float())


def test_every_finite_value_is_kept(ops: CpuOps) -> None:
    every = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for order in (torch.arange(len(every)), torch.randperm(len(every))):
        weight = every[order].view(-1, 255)
        got = rows(ops, ops.matrix(weight))
        assert torch.equal(got.view(torch.int32), weight.float().view(torch.int32))


def test_a_folded_matrix_takes_little_more_than_three_quarters(ops: CpuOps) -> None:
    weight = trained(1536, 576)
    assert ops.matrix(weight).nbytes <= 0.79 * weight.nbytes
    weight = scattered(1536, 576)
    assert weight.nbytes <= ops.matrix(weight).nbytes <= 1.01 * weight.nbytes


@pytest.mark.parametrize("others", [1, 2, 3, _OTHERS, _OTHERS + 1])
def test_weights_with_other_high_bytes_are_kept_beside(ops: CpuOps, others: int) -> None:
    width = 1024 // ops.packing.panel  # one block
    weight = torch.full((ops.packing.panel, width), 0.5).bfloat16()
    weight[:, 1:17] *= torch.exp2(torch.arange(0, -32, -2)).bfloat16()  # 16 high bytes
    weight[-1, -others:] = torch.exp2(torch.arange(-60, -60 - 2 * others, -2)).bfloat16()
    matrix = ops.matrix(weight)
    assert torch.equal(rows(ops, matrix), weight.float())
    assert (matrix.nbytes < weight.nbytes) == (others <= _OTHERS)
    x = torch.randn(3, width).bfloat16().float()
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(project(ops, x, weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 33, 100])
@pytest.mark.parametrize(("out", "width"), [(576, 192), (48, 1000), (250, 576)])
@pytest.mark.parametrize("kind", [trained, spotted])
def test_folding_changes_no_bit_of_a_product(
    ops: CpuOps, kind: Callable[[int, int], Tensor], count: int, out: int, width: int
) -> None:
    x = torch.randn(count, width)
    weight = kind(out, width)
    spoilt = weight.clone()
    spoilt[:: ops.packing.panel] = scattered(len(spoilt[:: ops.packing.panel]), width)
    assert ops.matrix(spoilt).nbytes > 1.2 * ops.matrix(weight).nbytes
    same = torch.arange(out) % ops.packing.panel != 0
    assert torch.equal(project(ops, x, weight)[:, same], project(ops, x, spoilt)[:, same])
