"""The best result of each row without the others: the argmax of what a projection gives."""

import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Finish, Linear, LoraSegment, Norm, Patch
from ext.quantize import quantize

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

WIDTH = 72


def ops_of(threads: int, *, rounding: bool = False) -> CpuOps:
    return CpuOps(threads=threads, rounding=rounding)


def check(ops: CpuOps, x: Tensor, linear: Linear, patch: Patch | None = None) -> list[int]:
    """What `best` gives, which is the argmax of the results themselves."""
    norm = Norm("rms", 1e-6, torch.linspace(0.5, 1.5, x.shape[1]))
    (logits,) = ops.project(x, norm, (linear,), (patch,))
    best = ops.best(x, norm, linear, patch)
    assert best.dtype is torch.int64
    assert best.tolist() == ops.argmax(logits).tolist() == logits.argmax(1).tolist()
    return best.tolist()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("out", [1, 31, 640, 2003])
def test_best_is_the_argmax(threads: int, rounding: bool, dtype: torch.dtype, out: int) -> None:
    torch.manual_seed(out)
    ops = ops_of(threads, rounding=rounding)
    linear = Linear(ops.matrix(torch.randn(out, WIDTH).to(dtype)), torch.randn(out))
    for rows in (1, 2, 7, 8, 32, 96, 97, 200, 300):
        check(ops, torch.randn(rows, WIDTH), linear)


@pytest.mark.parametrize("rounding", [False, True])
def test_of_equals_the_first_counts(rounding: bool) -> None:
    """Weights that repeat, so that the threads find the same best at many places."""
    torch.manual_seed(0)
    ops = ops_of(4, rounding=rounding)
    some = torch.randn(50, WIDTH).bfloat16()
    linear = Linear(ops.matrix(some.repeat(40, 1)))
    for rows in (1, 3, 8, 40, 130):
        for _ in range(5):
            best = check(ops, torch.randn(rows, WIDTH), linear)
            assert max(best) < len(some)


def test_rows_without_a_best_have_the_first() -> None:
    ops = ops_of(2)
    linear = Linear(ops.matrix(torch.randn(640, WIDTH)), torch.full((640,), -torch.inf))
    assert check(ops, torch.randn(9, WIDTH), linear) == [0] * 9
    nothing = torch.full((3, WIDTH), torch.nan)
    assert ops.best(nothing, None, linear, None).tolist() == [0] * 3
    assert ops.best(torch.empty(0, WIDTH), None, linear, None).tolist() == []


@pytest.mark.parametrize("rounding", [False, True])
def test_low_rank_pieces_and_ends_count(rounding: bool) -> None:
    torch.manual_seed(1)
    ops = ops_of(2, rounding=rounding)
    linear = Linear(ops.matrix(torch.randn(640, WIDTH).bfloat16()))
    a, b = torch.randn(8, WIDTH) / 4, torch.randn(640, 8)
    patch = Patch(
        (LoraSegment(2, 20, ops.factor(a), ops.factor(b), 2.0),),
        (Finish(5, 9, torch.randn(640), torch.randn(640)),),
    )
    x = torch.randn(32, WIDTH)
    assert check(ops, x, linear, patch)[2:20] != check(ops, x, linear)[2:20]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_of_codes(bits: str) -> None:
    torch.manual_seed(2)
    ops = ops_of(2)
    linear = Linear(ops.coded(quantize(torch.randn(640, WIDTH), bits)))
    for rows in (1, 9, 100):
        check(ops, torch.randn(rows, WIDTH), linear)
