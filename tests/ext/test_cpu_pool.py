"""The native thread pool under more threads than cores: every task of every job runs once."""

import random

import pytest
import torch

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Linear, Norm

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

CALLS = 20_000


def test_jobs_of_changing_size_never_mix() -> None:
    torch.manual_seed(0)
    ops = CpuOps(threads=6)
    norm = Norm("rms", 1e-6, torch.rand(64))
    linears = [Linear(ops.matrix(torch.randn(out, 64))) for out in (64, 160, 544, 1280)]
    batches = [torch.randn(rows, 64) for rows in (1, 3, 9)]
    cases = [(x, linear) for x in batches for linear in linears]
    wanted = [ops.project(x, norm, [linear], [None])[0].clone() for x, linear in cases]
    chance = random.Random(0)
    for _ in range(CALLS):
        case = chance.randrange(len(cases))
        x, linear = cases[case]
        assert torch.equal(ops.project(x, norm, [linear], [None])[0], wanted[case])
