"""What this machine can do at most: memory read and float32 multiply-adds, all cores together.

Each is the best of several ways to get there: the probes of `bench/limits.cpp`, and torch, which
has more kinds of products. A float32 activation times a bfloat16 weight is, without loss, three
products of bfloat16, so where a machine multiplies those more than three times as fast (AMX), a
third of that rate is its limit.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence

import torch

from bench.kernels import limits
from bench.roofline import Limits
from ext.build import Unavailable
from ext.cpu import CpuOps

_READ_BYTES = 512 << 20
_SIZE = 1024
_REPEATS = 5
_PIECES = 3


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure() -> Limits:
    """The best of all tries, because what disturbs a try only makes it slower."""
    torch.set_num_threads(cores())
    found = [_by_torch()]
    with contextlib.suppress(Unavailable):
        probed = limits(CpuOps(cores()), time.perf_counter)
        rates = (probed.read_gb_s, probed.gflop_s, probed.rounded_gflop_s)
        found.append(Limits(*(1e9 * rate for rate in rates)))
    return best(found)


def best(found: Sequence[Limits]) -> Limits:
    """The highest of each limit."""
    return Limits(
        read_bytes_per_s=max(one.read_bytes_per_s for one in found),
        flops_per_s=max(one.flops_per_s for one in found),
        rounded_flops_per_s=max(one.rounded_flops_per_s for one in found),
    )


def _by_torch() -> Limits:
    data = torch.ones(_READ_BYTES // 4)
    a, b = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    low, weights = a.bfloat16(), b.bfloat16()
    exact, rounded = _shortest(lambda: a @ b), _shortest(lambda: low @ weights)
    return Limits(
        read_bytes_per_s=_READ_BYTES / _shortest(data.sum),
        flops_per_s=2 * _SIZE**3 / min(exact, _PIECES * rounded),
        rounded_flops_per_s=2 * _SIZE**3 / rounded,
    )


def _shortest(work: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
